"""What a step needs in every layer, worked out on the device once: where each token stands, and who does which work.

Everything follows from the lengths on the device. The host knows upper bounds alone, takes grids from them, and a CUDA
graph that recorded one step serves every later one: programs that find nothing to do end at once, and the context is
split over as many as the real lengths can keep busy.

One launch, by the first layer of a step. Its first program cuts the query tokens of each sequence into *tiles*, once
for attention and once for scoring, and the scoring of tiles with long contexts into *items*; the others say for each
token which sequence it belongs to and where it stands there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from triton import jit

from ..batch import BLOCK_SIZE, Batch
from ..share import ALL, Share
from .launch import Options, kernel
from .sizes import ceil_div
from .workspace import kept_of

NUM_TILES, NUM_SPLITS, NUM_ITEMS = (tl.constexpr(i) for i in range(3))
"""Places in ``Plan.counts``."""
COUNTS = 3
TILE_FIELDS = tl.constexpr(4)
ITEM_FIELDS = tl.constexpr(8)
LANES = 256
TOKENS = 512
"""Tokens that a program locates."""


class Shape(NamedTuple):
    """What a plan is made for.

    Attributes:
        num_tokens: query tokens that the layers are given, padding counted.
        num_kv_heads: of the layers.
        topk: tokens that see no more blocks than this are not scored.
        tile_tokens: most query tokens of one sequence that attention takes together; 0 for no tiles.
        programs: of attention that run at once, among which a tile's blocks may be shared out; 0 if they must not be.
        tile_blocks: that the tokens of a tile select, about.
        score_tile_tokens: most query tokens of one sequence that are scored together; 0 if none are scored.
        score_programs: that scoring should keep busy.
        score_own: whether a token's own block is scored.
        share: of the blocks that are scored.
    """

    num_tokens: int
    num_kv_heads: int
    topk: int = 1
    tile_tokens: int = 0
    programs: int = 0
    tile_blocks: int = 1
    score_tile_tokens: int = 0
    score_programs: int = 0
    score_own: bool = False
    share: Share = ALL


class Plan:
    """A step, planned. All tensors are int32 on the device.

    Attributes:
        counts: ``[3]`` tiles, programs among which attention splits a tile's blocks, scoring items.
        token_seq: ``[num_tokens]`` the sequence of each token; any for padding.
        token_pos: ``[num_tokens]`` its position there; -1 for padding.
        tiles: ``[max_tiles, 4]`` sequence, first token, number of tokens, position of the first.
        items: ``[max_items, 8]`` sequence, first token, number of tokens, position of the first, first block, end;
            blocks are counted within the share.
        arrived: ``[max_tiles * num_kv_heads]`` zeros, and zero again after every layer.
        max_programs: of attention.
    """

    def __init__(self, batch: Batch, shape: Shape) -> None:
        num_tokens, num_seqs = shape.num_tokens, batch.num_seqs
        max_blocks = batch.max_blocks
        tokens = min(num_tokens, num_seqs * batch.max_query_len)
        self.max_tiles = _most_tiles(tokens, num_seqs, shape.tile_tokens)
        max_score_tiles = _most_tiles(tokens, num_seqs, shape.score_tile_tokens)
        # The device estimates the work of a long sequence by its ends; a tile may come to one item more.
        self.max_items = min(max_score_tiles * max(1, max_blocks), 2 * max_score_tiles + shape.score_programs)
        tasks = self.max_tiles * shape.num_kv_heads
        self.max_programs = max(1, tasks, min(MAX_WAVES * shape.programs, tasks * MAX_SPLITS.value))
        self.shape = shape

        sizes = (
            COUNTS, num_seqs, num_seqs, tasks, num_tokens, num_tokens, self.max_tiles * TILE_FIELDS.value,
            max_score_tiles * ITEM_FIELDS.value, self.max_items * ITEM_FIELDS.value,
        )  # fmt: skip
        aligned = [ceil_div(size, 4) * 4 for size in sizes]  # each begins at a multiple of 16 bytes
        memory = torch.empty(sum(aligned), dtype=torch.int32, device=batch.seq_lens.device)
        parts = memory.split(aligned)
        self.counts, first_tile, first_score_tile, self.arrived = parts[:4]
        self.token_seq, self.token_pos, self.tiles, score_tiles, self.items = parts[4:]
        msa_plan(
            (1 + ceil_div(num_tokens, TOKENS),),
            (
                batch.cu_seqlens_q, batch.seq_lens, self.counts, first_tile, first_score_tile, self.arrived,
                self.token_seq, self.token_pos, self.tiles, score_tiles, self.items,
                num_seqs, num_tokens, tasks, max_blocks, num_seqs.bit_length(), max_score_tiles.bit_length(),
                shape.programs, shape.tile_blocks, shape.score_programs, shape.share.rank,
            ),
            (
                shape.num_kv_heads, shape.tile_tokens, shape.score_tile_tokens, shape.topk, shape.score_own,
                shape.share.ranks, START_COST, COMBINE_COST, MAX_WAVES, BLOCK_SIZE, LANES, TOKENS,
            ),
            Options(num_warps=8, num_stages=1),
        )()  # fmt: skip


MAX_SPLITS = tl.constexpr(16)
"""Programs among which attention splits the blocks of a tile at most."""
MAX_WAVES = 2
"""Programs that a split may make of attention, in those that run at once."""
START_COST, COMBINE_COST = 8, 1
"""What it takes a program of attention to begin, and the last one of a tile to combine a split: in quarters of what a
block takes."""


def _most_tiles(num_tokens: int, num_seqs: int, tile_tokens: int) -> int:
    return min(num_tokens, ceil_div(num_tokens, tile_tokens) + num_seqs) if tile_tokens else 0


def plan_of(batch: Batch, shape: Shape) -> Plan:
    """The plan of a batch, made when the first layer asks."""
    kept = kept_of(batch)
    if shape not in kept:
        kept[shape] = Plan(batch, shape)
    return kept[shape]


@kernel(unaligned=("cu_seqlens_q_ptr", "seq_lens_ptr"))
def msa_plan(
    cu_seqlens_q_ptr, seq_lens_ptr, counts_ptr, first_tile_ptr, first_score_tile_ptr, arrived_ptr,
    token_seq_ptr, token_pos_ptr, tiles_ptr, score_tiles_ptr, items_ptr,
    num_seqs, num_tokens, num_tasks, max_blocks, seq_steps, tile_steps, programs, tile_blocks,
    score_programs, rank,
    NUM_KV_HEADS: tl.constexpr, TILE: tl.constexpr, SCORE_TILE: tl.constexpr, TOPK: tl.constexpr,
    SCORE_OWN: tl.constexpr, RANKS: tl.constexpr, START_COST: tl.constexpr, COMBINE_COST: tl.constexpr,
    MAX_WAVES: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    if tl.program_id(0) > 0:
        _locate_tokens(
            cu_seqlens_q_ptr, seq_lens_ptr, token_seq_ptr, token_pos_ptr, num_seqs, num_tokens, seq_steps, TOKENS
        )
        return
    lane = tl.arange(0, LANES)
    for start in range(0, num_tasks, LANES):
        tl.store(arrived_ptr + start + lane, tl.zeros([LANES], tl.int32), mask=start + lane < num_tasks)

    # The sequences: how many tiles each has, and the number of its first.
    num_tiles = 0
    num_score_tiles = 0
    work = 0
    for start in range(0, num_seqs, LANES):
        seq = start + lane
        live = seq < num_seqs
        begin = tl.load(cu_seqlens_q_ptr + seq, mask=live, other=0)
        query_len = tl.load(cu_seqlens_q_ptr + seq + 1, mask=live, other=0) - begin
        seq_len = tl.load(seq_lens_ptr + seq, mask=live, other=0)
        if TILE > 0:
            tiles = tl.where(seq_len > 0, tl.cdiv(query_len, TILE), 0)
            tl.store(first_tile_ptr + seq, num_tiles + tl.cumsum(tiles) - tiles, mask=live)
            num_tiles += tl.sum(tiles)
        if SCORE_TILE > 0:
            skipped = _unscored(query_len, seq_len, TOPK, BLOCK)
            tiles = tl.cdiv(query_len - skipped, SCORE_TILE)
            tl.store(first_score_tile_ptr + seq, num_score_tiles + tl.cumsum(tiles) - tiles, mask=live)
            num_score_tiles += tl.sum(tiles)
            first_blocks = _blocks_to_score(
                seq_len - query_len + skipped + SCORE_TILE - 1, max_blocks, rank, BLOCK, SCORE_OWN, RANKS
            )
            last_blocks = _blocks_to_score(seq_len - 1, max_blocks, rank, BLOCK, SCORE_OWN, RANKS)
            blocks = (tl.minimum(first_blocks, last_blocks) + last_blocks + 1) // 2
            work += tl.sum(tl.where(tiles > 0, tiles * blocks, 0))
    splits = _cheapest_splits(
        tl.maximum(num_tiles * NUM_KV_HEADS, 1), programs, tile_blocks, START_COST, COMBINE_COST, MAX_WAVES
    )
    tl.store(counts_ptr + NUM_TILES, num_tiles)
    tl.store(counts_ptr + NUM_SPLITS, splits)
    tl.debug_barrier()

    # The tiles of attention.
    if TILE > 0:
        for start in range(0, num_tiles, LANES):
            tile = start + lane
            live = tile < num_tiles
            seq = _owner(first_tile_ptr, tile, num_seqs, seq_steps)
            begin = tl.load(cu_seqlens_q_ptr + seq)
            query_len = tl.load(cu_seqlens_q_ptr + seq + 1) - begin
            seq_len = tl.load(seq_lens_ptr + seq)
            offset = (tile - tl.load(first_tile_ptr + seq)) * TILE
            count = tl.minimum(query_len - offset, TILE)
            field = tiles_ptr + tile * TILE_FIELDS
            tl.store(field, seq, mask=live)
            tl.store(field + 1, begin + offset, mask=live)
            tl.store(field + 2, count, mask=live)
            tl.store(field + 3, seq_len - query_len + offset, mask=live)

    # The tiles of scoring, then their items: equal shares of a tile's blocks, in all about as many as programs.
    num_items = 0
    if SCORE_TILE > 0:
        share = tl.maximum(tl.cdiv(work, tl.maximum(score_programs - num_score_tiles, score_programs // 2)), 1)
        for start in range(0, num_score_tiles, LANES):
            tile = start + lane
            live = tile < num_score_tiles
            seq = _owner(first_score_tile_ptr, tile, num_seqs, seq_steps)
            begin = tl.load(cu_seqlens_q_ptr + seq)
            query_len = tl.load(cu_seqlens_q_ptr + seq + 1) - begin
            seq_len = tl.load(seq_lens_ptr + seq)
            offset = _unscored(query_len, seq_len, TOPK, BLOCK)
            offset += (tile - tl.load(first_score_tile_ptr + seq)) * SCORE_TILE
            count = tl.minimum(query_len - offset, SCORE_TILE)
            position = seq_len - query_len + offset
            blocks = _blocks_to_score(position + count - 1, max_blocks, rank, BLOCK, SCORE_OWN, RANKS)
            items = tl.where(live, tl.cdiv(blocks, share), 0)
            field = score_tiles_ptr + tile * ITEM_FIELDS
            tl.store(field, num_items + tl.cumsum(items) - items, mask=live)
            tl.store(field + 1, seq, mask=live)
            tl.store(field + 2, begin + offset, mask=live)
            tl.store(field + 3, count, mask=live)
            tl.store(field + 4, position, mask=live)
            tl.store(field + 5, blocks, mask=live)
            num_items += tl.sum(items)
        tl.debug_barrier()
        for start in range(0, num_items, LANES):
            item = start + lane
            live = item < num_items
            tile = _owner_of_item(score_tiles_ptr, item, num_score_tiles, tile_steps)
            field = score_tiles_ptr + tile * ITEM_FIELDS
            blocks = tl.load(field + 5)
            parts = tl.maximum(tl.cdiv(blocks, share), 1)
            part = item - tl.load(field)
            into = items_ptr + item * ITEM_FIELDS
            for i in tl.static_range(4):
                tl.store(into + i, tl.load(field + 1 + i), mask=live)
            tl.store(into + 4, part * blocks // parts, mask=live)
            tl.store(into + 5, (part + 1) * blocks // parts, mask=live)
    tl.store(counts_ptr + NUM_ITEMS, num_items)


@jit
def _cheapest_splits(
    tasks, programs, tile_blocks, START_COST: tl.constexpr, COMBINE_COST: tl.constexpr, MAX_WAVES: tl.constexpr
):
    """Among how many programs the blocks of a tile are shared out so that all are done soonest."""
    splits = 1 + tl.arange(0, MAX_SPLITS)
    waves = tl.cdiv(tasks * splits, tl.maximum(programs, 1))
    cost = waves * (tl.cdiv(tile_blocks, splits) * 4 + START_COST) + tl.where(splits > 1, splits * COMBINE_COST, 0)
    allowed = (splits == 1) | (tasks * splits <= MAX_WAVES * programs)
    # Of equal ones the fewest.
    return tl.min(tl.where(allowed, cost * 32 + splits, 0x7FFFFFFF)) % 32


@jit
def _locate_tokens(
    cu_seqlens_q_ptr, seq_lens_ptr, token_seq_ptr, token_pos_ptr, num_seqs, num_tokens, seq_steps, TOKENS: tl.constexpr
):
    token = (tl.program_id(0) - 1) * TOKENS + tl.arange(0, TOKENS)
    live = token < num_tokens
    seq = _owner(cu_seqlens_q_ptr, token, num_seqs, seq_steps)
    some = live & (seq < num_seqs)  # none, in a batch without sequences
    seq_len = tl.load(seq_lens_ptr + seq, mask=some, other=0)
    end = tl.load(cu_seqlens_q_ptr + seq + 1, mask=some, other=0)
    position = tl.where((token < end) & (seq_len > 0), seq_len - (end - token), -1)
    tl.store(token_seq_ptr + token, seq, mask=live)
    tl.store(token_pos_ptr + token, position, mask=live)


@jit
def _owner(first_ptr, x, count, steps):
    """The last of ``count`` rising numbers that is not greater than ``x``; the first if none is."""
    low = x * 0
    high = low + tl.maximum(count - 1, 0)
    for _ in range(steps):
        middle = (low + high + 1) // 2
        begins_before = tl.load(first_ptr + middle) <= x
        low = tl.where(begins_before, middle, low)
        high = tl.where(begins_before, high, middle - 1)
    return low


@jit
def _owner_of_item(score_tiles_ptr, item, count, steps):
    """As :func:`_owner`, over the first items of tiles."""
    low = item * 0
    high = low + tl.maximum(count - 1, 0)
    for _ in range(steps):
        middle = (low + high + 1) // 2
        begins_before = tl.load(score_tiles_ptr + middle * ITEM_FIELDS) <= item
        low = tl.where(begins_before, middle, low)
        high = tl.where(begins_before, high, middle - 1)
    return low


@jit
def _unscored(query_len, seq_len, TOPK: tl.constexpr, BLOCK: tl.constexpr):
    """Query tokens at the front that see no more blocks than are taken anyway; all of padding's."""
    few = tl.minimum(tl.maximum(TOPK * BLOCK - (seq_len - query_len), 0), query_len)
    return tl.where(seq_len > 0, few, query_len)


@jit
def _blocks_to_score(position, max_blocks, rank, BLOCK: tl.constexpr, SCORE_OWN: tl.constexpr, RANKS: tl.constexpr):
    """Blocks of the share that a token at ``position`` sees, its own counted only if it is scored."""
    blocks = tl.minimum(tl.maximum(position, 0) // BLOCK + (1 if SCORE_OWN else 0), max_blocks)
    return of_share(blocks, rank, RANKS)


@jit
def of_share(blocks, rank, RANKS: tl.constexpr):
    """How many of the first ``blocks`` blocks are those of ``rank``; see :class:`msa_backend.kernels.share.Share`."""
    return blocks if RANKS == 1 else (tl.maximum(blocks, 0) - rank + RANKS - 1) // RANKS
