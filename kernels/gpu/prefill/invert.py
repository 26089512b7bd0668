"""From "the blocks of each token" to "the tokens of each block", on the device and without a sort.

Three small launches. *Count*: every selected (KV head, page) takes a ticket from its counter, except those of
tiles whose tokens agree: these are left to the queries-outer kernel. *Allocate*: each counter
gets a stretch of one long list, and is cut into work items. *Fill*: each selection writes itself to its stretch, at the
place its ticket says.

Lists go by page, not by block of a sequence: sequences that share a prefix share its pages, and one load serves them
all. Selections of a token's own, partly visible block are listed apart, so that all others need no mask.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ...batch import BLOCK_SIZE, Batch
from ..launch import Launch, Options, kernel
from ..plan import NUM_TILES, TILE_FIELDS, Plan
from ..sizes import ceil_div, next_power_of_2
from ..tiles import live_page
from ..union import blocks_of_tile
from ..workspace import workspace_of

TOKEN_BITS = tl.constexpr(24)
"""Bits of a packed entry that hold the token; 7 above them hold how much of the block it sees."""
TOKEN_MASK = tl.constexpr((1 << 24) - 1)
MAX_TOKENS = 1 << 24
ELSEWHERE = tl.constexpr(-2)

ALLOCATE_TILE = 256
FILL_TILE = 1024
LIST_TOKENS = 256
"""Where few pages are chosen by many tokens, each page gets several lists of about this length: tokens that draw their
tickets from one counter wait for each other."""
MAX_LISTS_OF_A_PAGE = 16
CURSORS = 4
MAX_LISTS = 1 << 21
"""All counters are cleared and looked through in every step, so a cache of very many pages gets one list for each."""


class Inverse(NamedTuple):
    """The tokens of each (KV head, page), in work items.

    Attributes:
        entries: ``[max_entries]`` int32, list after list: ``token | (visible - 1) << 24``. Each list starts at a
            multiple of ``tile_tokens``; what lies between them is undefined.
        place: ``[num_kv_heads, num_tokens, topk]`` int32, where in ``entries`` each selection stands;
            -1 for none, -2 for those of tokens that are left to another kernel.
        items: ``[2, max_items, 3]`` int32, work items ``kv_head * num_pages + page, first entry, number of entries``;
            first those of blocks wholly visible to their queries, then the others.
        cursors: ``[4]`` int32: from 1 on, how many items of each there are. Whoever is the last to need them leaves
            zeros.
    """

    entries: Tensor
    place: Tensor
    items: Tensor
    cursors: Tensor


def invert(
    block_ids: Tensor,
    batch: Batch,
    plan: Plan,
    *,
    num_pages: int,
    item_tokens: int,
    tile_tokens: int,
    most_blocks: int,
    taken: Tensor,
) -> tuple[Inverse, list[Launch]]:
    """The lists, and the launches that fill them.

    Args:
        block_ids: ``[num_kv_heads, num_tokens, topk]`` int32, -1 for none.
        num_pages: pages of the cache.
        item_tokens: most entries in a work item; a multiple of ``tile_tokens``.
        tile_tokens: entries that are worked on together.
        most_blocks: tokens of a tile of the plan that selected no more together are left out.
        taken: ``[plan.max_programs]`` int32, filled by the first launch: 1 for such tiles, the last tile first and its
            KV heads in order; undefined past the first.

    Raises:
        ValueError: more tokens in a step than fit in a packed entry.
    """
    num_heads, num_tokens, topk = block_ids.shape
    if num_tokens >= MAX_TOKENS:
        raise ValueError(f"{num_tokens} query tokens in one step, but at most {MAX_TOKENS - 1} fit; use chunks")
    selections = num_heads * num_tokens * topk
    num_blocks = batch.num_seqs * ceil_div(batch.max_seq_len, BLOCK_SIZE)
    wanted = min(MAX_LISTS_OF_A_PAGE, num_tokens * topk // (num_blocks * LIST_TOKENS))
    lists_of_a_page = max(1, min(wanted, MAX_LISTS // (num_heads * num_pages)))
    num_lists = lists_of_a_page * num_heads * num_pages
    max_used_lists = min(lists_of_a_page * num_heads * min(num_pages, num_blocks), selections)

    max_items = ceil_div(selections, item_tokens) + max_used_lists

    hold = partial(workspace_of(batch).hold, dtype=torch.int32)
    counts = hold("counts", 2 * num_lists, zeroed=True)
    cursors = hold("cursors", CURSORS, zeroed=True)
    offsets = hold("offsets", 2 * num_lists)
    keys = hold("keys", selections)
    place = hold("place", selections).view(num_heads, num_tokens, topk)
    entries = hold("entries", selections + 2 * max_used_lists * (tile_tokens - 1))
    items = hold("items", 2 * max_items * 3).view(2, max_items, 3)
    count = msa_count(
        (plan.max_tiles, num_heads),
        (
            block_ids, taken, keys, place, counts, plan.counts, plan.tiles, plan.token_pos, batch.block_table,
            block_ids.stride(0), block_ids.stride(1), batch.block_table.stride(0), num_tokens, num_pages, num_lists,
            ceil_div(num_tokens, lists_of_a_page),
        ),
        (most_blocks, topk, next_power_of_2(topk), plan.shape.tile_tokens, BLOCK_SIZE),
        Options(num_warps=max(1, min(4, plan.shape.tile_tokens * next_power_of_2(topk) // 64))),
    )  # fmt: skip
    allocate = msa_allocate(
        (ceil_div(num_lists, ALLOCATE_TILE), 2),
        (counts, offsets, items, cursors, num_lists, num_heads * num_pages, max_items, item_tokens),
        (ALLOCATE_TILE, tile_tokens),
        Options(),
    )
    fill = msa_fill(
        (ceil_div(selections, FILL_TILE),),
        (keys, place, offsets, entries, counts, selections, num_tokens, 2 * num_lists),
        (topk, FILL_TILE),
        Options(),
    )
    return Inverse(entries, place, items, cursors), [count, allocate, fill]


@kernel(unaligned=("block_ids_ptr", "block_table_ptr"))
def msa_count(
    block_ids_ptr, taken_ptr, keys_ptr, place_ptr, counts_ptr, plan_counts_ptr, tiles_ptr, token_pos_ptr,
    block_table_ptr, ids_head_stride, ids_token_stride, table_stride, num_tokens, num_pages, num_lists, list_tokens,
    MOST_BLOCKS: tl.constexpr, TOPK: tl.constexpr, TOPK_PADDED: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    head = tl.program_id(1)
    num_heads = tl.num_programs(1)
    num_tiles = tl.load(plan_counts_ptr + NUM_TILES)
    # One wait for all of them: there is memory, if not a tile, for every program.
    tiles_ptr += tile * TILE_FIELDS
    seq = tl.load(tiles_ptr)
    first_token = tl.load(tiles_ptr + 1)
    count = tl.load(tiles_ptr + 2)
    first_position = tl.load(tiles_ptr + 3)
    entry = tl.arange(0, TOKENS * TOPK_PADDED)
    slot = entry % TOPK_PADDED
    if tile < num_tiles:
        ids_ptr = block_ids_ptr + head.to(tl.int64) * ids_head_stride + first_token.to(tl.int64) * ids_token_stride
        block, _, is_first = blocks_of_tile(ids_ptr, ids_token_stride, count, TOKENS, TOPK, TOPK_PADDED)
        num_blocks = tl.sum(is_first.to(tl.int32))
        is_taken = (num_blocks <= MOST_BLOCKS).to(tl.int32)
        tl.store(taken_ptr + (num_tiles - 1 - tile) * num_heads + head, is_taken)
        token = first_token + entry // TOPK_PADDED
        visible = tl.minimum(first_position + entry // TOPK_PADDED + 1 - block * BLOCK, BLOCK)
        chosen = (block >= 0) & (visible > 0) & (entry * 0 == is_taken)
        page = live_page(block_table_ptr + seq.to(tl.int64) * table_stride + tl.where(chosen, block, 0), num_pages)
        key = (token // list_tokens * num_heads + head) * num_pages + page
        key += tl.where(visible < BLOCK, num_lists, 0)
        ticket = tl.atomic_add(counts_ptr + key, 1, mask=chosen, sem="relaxed")
        at = (head * num_tokens + token) * TOPK + slot
        none = tl.where(entry * 0 == is_taken, -1, ELSEWHERE)
        tl.store(keys_ptr + at, tl.where(chosen, key, none), mask=(entry // TOPK_PADDED < count) & (slot < TOPK))
        tl.store(place_ptr + at, ticket | (visible - 1) << TOKEN_BITS, mask=chosen)
    # Padding is in no tile.
    for start in range(0, num_tokens, tl.num_programs(0) * TOKENS):
        token = start + tile * TOKENS + entry // TOPK_PADDED
        position = tl.load(token_pos_ptr + token, mask=token < num_tokens, other=0)
        at = (head * num_tokens + token) * TOPK + slot
        tl.store(keys_ptr + at, entry * 0 + ELSEWHERE, mask=(position < 0) & (slot < TOPK))


@kernel()
def msa_allocate(
    counts_ptr, offsets_ptr, items_ptr, cursors_ptr, num_lists, num_keys, max_items, item_tokens,
    TILE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    kind = tl.program_id(1)
    list_id = tl.program_id(0) * TILE + tl.arange(0, TILE)
    count = tl.load(counts_ptr + kind * num_lists + list_id, mask=list_id < num_lists, other=0)
    if tl.max(count) > 0:
        # Stretches may lie in any order, so a running cursor replaces a scan over all programs.
        space = (count + ALIGN - 1) // ALIGN * ALIGN
        offset = tl.atomic_add(cursors_ptr, tl.sum(space), sem="relaxed") + tl.cumsum(space) - space
        tl.store(offsets_ptr + kind * num_lists + list_id, offset, mask=count > 0)
        num_items = (count + item_tokens - 1) // item_tokens
        first = tl.atomic_add(cursors_ptr + 1 + kind, tl.sum(num_items), sem="relaxed")
        item_ptrs = items_ptr + (kind * max_items + first + tl.cumsum(num_items) - num_items) * 3
        for i in range(tl.max(num_items)):
            used = i < num_items
            tl.store(item_ptrs + i * 3, list_id % num_keys, mask=used)
            tl.store(item_ptrs + i * 3 + 1, offset + i * item_tokens, mask=used)
            tl.store(item_ptrs + i * 3 + 2, tl.minimum(count - i * item_tokens, item_tokens), mask=used)


@kernel()
def msa_fill(
    keys_ptr, place_ptr, offsets_ptr, entries_ptr, counts_ptr, selections, num_tokens, num_counts,
    TOPK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    # Nobody needs the counters any more: zeros for the next layer.
    for start in range(0, num_counts, tl.num_programs(0) * TILE):
        tl.store(counts_ptr + start + at, tl.zeros([TILE], tl.int32), mask=start + at < num_counts)
    there = at < selections
    key = tl.load(keys_ptr + at, mask=there, other=-1)
    chosen = key >= 0
    packed = tl.load(place_ptr + at, mask=chosen, other=0)
    entry = tl.load(offsets_ptr + key, mask=chosen, other=0) + (packed & TOKEN_MASK)
    token = at // TOPK % num_tokens
    tl.store(entries_ptr + entry, token | (packed & ~TOKEN_MASK), mask=chosen)
    tl.store(place_ptr + at, tl.where(chosen, entry, key), mask=there)
