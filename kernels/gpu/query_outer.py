"""Attention, queries outer: a few neighbouring tokens walk over the union of the blocks that they selected.

Decode, drafts to verify, suffixes, in any mix, and prompts as far as neighbours agree. A *tile* is up to
``TILE_TOKENS`` tokens of one sequence with the query heads of one KV head, 64 rows of a product. Each block that any of
them selected is loaded once; a bit a token says who sees it. Where tiles are few, programs share out the blocks of
one, and the last of them to arrive combines what all have found.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton import jit

from ..batch import BLOCK_SIZE, Batch
from ..caches import LayerCaches
from . import arch, pdl
from .launch import Launch, Options, kernel
from .pages import Pages, units
from .pdl import let_next_start, wait_for_previous
from .plan import NUM_SPLITS, NUM_TILES, TILE_FIELDS, Plan
from .sizes import next_power_of_2
from .softmax import LOWEST, accumulate, finish, log_sum_exp, masked_weights, row_weights, start_softmax
from .tiles import UNIT, head_offsets, live_page, load_tile, load_tile_masked
from .union import blocks_of_tile
from .workspace import workspace_of

BLOCK_M = 64
"""Rows of a tile: tokens times the padded query heads of a group."""
SMALL_M = 16
"""Rows of a tile of so few tokens that more would be padding: a decode step's."""
MAX_TILE_TOKENS = 16


class Config(NamedTuple):
    block_n: int
    """Keys of a block that are worked on at a time."""
    num_warps: int
    ahead: int
    """Times so many keys that are on their way while others are worked on."""
    programs_per_sm: int
    """That a multiprocessor runs at once."""


DECODE = Config(128, 4, 1, 2)
"""Of steps whose tiles are all small."""
MIXED = Config(64, 4, 2, 2)


def tile_tokens(group: int) -> int:
    """Tokens of a tile of this many query heads to a KV head."""
    return max(1, min(MAX_TILE_TOKENS, BLOCK_M // next_power_of_2(group)))


def most_blocks(topk: int) -> int:
    """That a tile may select to be taken here rather than KV outer.

    Measured on the released model's shape: 9.6 ns a block of a tile, against 15.6 for as many rows KV outer.
    """
    return topk * 13 // 8


def small_tokens(group: int) -> int:
    """Tokens of a small tile; 0 if a group alone is larger."""
    return min(tile_tokens(group), SMALL_M // next_power_of_2(group))


class Tiling(NamedTuple):
    """The tiles of a step.

    Attributes:
        tokens: most of a tile.
        blocks: that they select, about.
        programs: that the chip runs at once.
    """

    tokens: int
    blocks: int
    programs: int


def tiling(group: int, topk: int, batch: Batch) -> Tiling:
    """Of this step."""
    num_sms = arch.num_sms(batch.seq_lens.device)
    small = small_tokens(group)
    if batch.max_query_len <= small:
        return Tiling(small, topk, DECODE.programs_per_sm * num_sms)
    # Four neighbouring tokens of the released model select 22 blocks.
    return Tiling(tile_tokens(group), topk * 11 // 8, MIXED.programs_per_sm * num_sms)


def attend_query_outer(
    q: Tensor,
    caches: LayerCaches,
    block_ids: Tensor,
    batch: Batch,
    plan: Plan,
    scale: float,
    out: Tensor,
    taken: Tensor | None,
    follows_topk: bool,
) -> Launch:
    """The launch that writes ``out`` of the tokens that it takes, and zeros for padding.

    Shapes are those of :func:`msa_backend.kernels.api.sparse_attention`.

    Args:
        taken: ``[plan.max_programs]`` int32: 0 for programs whose tile is left to another kernel. If None, none is.
        follows_topk: whether the launch before this one made ``block_ids``, and nothing else that is read here.
    """
    num_tokens, num_heads, dim = q.shape
    pages = caches.keep(Pages)
    num_kv_heads, topk = pages.num_kv_heads, block_ids.shape[2]
    group = num_heads // num_kv_heads
    group_padded = next_power_of_2(group)
    large = tile_tokens(group)
    small = small_tokens(group)
    only_small = batch.max_query_len <= small
    config = DECODE if only_small else MIXED
    # What fits for 128 channels of 16 bits.
    heavier = max(1, dim * max(q.element_size(), pages.k.element_size()) // 256)
    block_n = max(16, config.block_n // heavier)
    block_m = max(SMALL_M, (small if only_small else large) * group_padded)
    splits = plan.shape.programs > 0
    entries = block_m // group_padded * next_power_of_2(topk)
    partial = plan.max_programs * block_m if splits else 1
    workspace = workspace_of(batch)
    union = workspace.hold("union", plan.max_programs * 3 * entries, torch.int32)
    o_partial = workspace.hold("o_partial", partial * dim, q.dtype)
    lse = workspace.hold("lse", partial, torch.float32)
    dependent = follows_topk and pdl.available(q.device)
    return msa_query_outer(
        (plan.max_programs,),
        (
            q, pages.k, pages.v, block_ids, out, plan.counts if taken is None else taken, union, o_partial, lse,
            plan.counts, plan.tiles, plan.arrived, plan.token_pos, batch.block_table,
            pages.logit_scale(scale), pages.v_scale, num_tokens, pages.num_pages,
            *units("q", q.stride()[:2]), *pages.kv_strides, block_ids.stride(0), block_ids.stride(1),
            *units("out", out.stride()[:2]), batch.block_table.stride(0),
        ),
        (
            num_heads, num_kv_heads, group, group_padded, large, small, only_small, topk, next_power_of_2(topk), splits,
            taken is not None, dim, BLOCK_SIZE, block_m, block_n, next_power_of_2(num_heads),
            SMALL_M, config.ahead, dependent,
        ),
        Options(config.num_warps, 1, dependent),
    )  # fmt: skip


@kernel(unaligned=("block_table_ptr", "block_ids_ptr"))
def msa_query_outer(
    q_ptr, k_ptr, v_ptr, block_ids_ptr, out_ptr, taken_ptr, union_ptr, o_partial_ptr, lse_ptr,
    counts_ptr, tiles_ptr, arrived_ptr, token_pos_ptr, block_table_ptr,
    logit_scale, v_scale, num_tokens, num_pages,
    q_token_stride, q_head_stride, k_page_stride, k_head_stride, k_token_stride,
    v_page_stride, v_head_stride, v_token_stride, ids_head_stride, ids_token_stride,
    out_token_stride, out_head_stride, table_stride,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr,
    TILE_TOKENS: tl.constexpr, SMALL_TOKENS: tl.constexpr, ONLY_SMALL: tl.constexpr, TOPK: tl.constexpr,
    TOPK_PADDED: tl.constexpr, SPLIT: tl.constexpr, LEAVES: tl.constexpr, DIM: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEADS_PADDED: tl.constexpr,
    SMALL_M: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_next_start(PDL)
    program = tl.program_id(0)
    if LEAVES:
        is_taken = tl.load(taken_ptr + program)
    num_splits = tl.load(counts_ptr + NUM_SPLITS)
    split = program % num_splits
    head = program // num_splits % NUM_KV_HEADS
    # The last of a sequence's tiles have the most blocks: the longest first.
    tile = tl.load(counts_ptr + NUM_TILES) - 1 - program // num_splits // NUM_KV_HEADS
    if LEAVES:
        tile = tl.where(is_taken != 0, tile, -1)
    if tile >= 0:
        seq = tl.load(tiles_ptr + tile * TILE_FIELDS)
        first_token = tl.load(tiles_ptr + tile * TILE_FIELDS + 1)
        count = tl.load(tiles_ptr + tile * TILE_FIELDS + 2)
        position = tl.load(tiles_ptr + tile * TILE_FIELDS + 3)
        ids_ptr = block_ids_ptr + head.to(tl.int64) * ids_head_stride + first_token.to(tl.int64) * ids_token_stride
        table_ptr = block_table_ptr + seq.to(tl.int64) * table_stride
        if SMALL_TOKENS > 0 and (ONLY_SMALL or count <= SMALL_TOKENS):
            _attend_tile(
                q_ptr, k_ptr, v_ptr, ids_ptr, out_ptr, union_ptr, o_partial_ptr, lse_ptr, arrived_ptr,
                table_ptr, logit_scale, v_scale, num_pages, q_token_stride, q_head_stride, k_page_stride,
                k_head_stride, k_token_stride, v_page_stride, v_head_stride, v_token_stride, ids_token_stride,
                out_token_stride, out_head_stride, split, num_splits, head, tile * NUM_KV_HEADS + head, first_token,
                count, position, GROUP, GROUP_PADDED, SMALL_TOKENS, TOPK, TOPK_PADDED, SPLIT, DIM, BLOCK,
                SMALL_M, BLOCK_M, BLOCK_N, AHEAD, PDL,
            )  # fmt: skip
        elif not ONLY_SMALL:
            _attend_tile(
                q_ptr, k_ptr, v_ptr, ids_ptr, out_ptr, union_ptr, o_partial_ptr, lse_ptr, arrived_ptr,
                table_ptr, logit_scale, v_scale, num_pages, q_token_stride, q_head_stride, k_page_stride,
                k_head_stride, k_token_stride, v_page_stride, v_head_stride, v_token_stride, ids_token_stride,
                out_token_stride, out_head_stride, split, num_splits, head, tile * NUM_KV_HEADS + head, first_token,
                count, position, GROUP, GROUP_PADDED, TILE_TOKENS, TOPK, TOPK_PADDED, SPLIT, DIM, BLOCK,
                BLOCK_M, BLOCK_M, BLOCK_N, AHEAD, PDL,
            )  # fmt: skip
    wait_for_previous(PDL)
    for i in range(tl.cdiv(num_tokens - program, tl.num_programs(0))):
        token = (program + i * tl.num_programs(0)).to(tl.int64)
        if tl.load(token_pos_ptr + token) < 0:
            any_head = tl.arange(0, HEADS_PADDED)
            place = (token * out_token_stride + any_head * out_head_stride)[:, None] * UNIT
            zeros = tl.zeros([HEADS_PADDED, DIM], out_ptr.dtype.element_ty)
            tl.store(out_ptr + place + tl.arange(0, DIM)[None, :], zeros, mask=(any_head < NUM_HEADS)[:, None])


@jit
def _attend_tile(
    q_ptr, k_ptr, v_ptr, ids_ptr, out_ptr, union_ptr, o_partial_ptr, lse_ptr, arrived_ptr, table_ptr,
    logit_scale, v_scale, num_pages, q_token_stride, q_head_stride, k_page_stride, k_head_stride, k_token_stride,
    v_page_stride, v_head_stride, v_token_stride, ids_token_stride, out_token_stride, out_head_stride,
    split, num_splits, head, task, first_token, count, position,
    GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, TOKENS: tl.constexpr, TOPK: tl.constexpr,
    TOPK_PADDED: tl.constexpr, SPLIT: tl.constexpr, DIM: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, PARTIAL_M: tl.constexpr, BLOCK_N: tl.constexpr,
    AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program's share of the blocks of ``count`` tokens, of which the first stands at ``position``."""
    offs_m = tl.arange(0, BLOCK_M)
    in_tile = offs_m // GROUP_PADDED
    q_head = head * GROUP + offs_m % GROUP_PADDED
    live = (in_tile < count) & (offs_m % GROUP_PADDED < GROUP)
    token = (first_token + in_tile).to(tl.int64)
    channel = tl.arange(0, DIM)
    q = tl.load(
        q_ptr + (token * q_token_stride + q_head * q_head_stride)[:, None] * UNIT + channel[None, :],
        mask=live[:, None],
        other=0.0,
    )
    if q.dtype != k_ptr.dtype.element_ty and k_ptr.dtype.element_ty.primitive_bitwidth > 8:
        q = q.to(tl.float32)

    k_offsets = head_offsets(head, k_head_stride, k_token_stride, BLOCK_N, DIM)
    v_offsets = head_offsets(head, v_head_stride, v_token_stride, BLOCK_N, DIM)
    PARTS: tl.constexpr = BLOCK // BLOCK_N
    m_i, l_i, acc = start_softmax(BLOCK_M, DIM)
    # What came before top-k is done, so all but its choice may be read already.
    wait_for_previous(PDL)
    if TOKENS == 1:
        # Its blocks are listed as they are; the mask of the last is cheap where loads are waited for.
        total = tl.minimum(position // BLOCK + 1, TOPK)
        num_whole = 0
        union_ptr = ids_ptr
    else:
        # Of the step's largest tiles, whatever the size of this one: another program's list must not lie here.
        union_ptr += tl.program_id(0).to(tl.int64) * (3 * (PARTIAL_M // GROUP_PADDED) * TOPK_PADDED)
        num_whole, total = _unite(
            ids_ptr,
            ids_token_stride,
            table_ptr,
            num_pages,
            union_ptr,
            position,
            count,
            TOKENS,
            TOPK,
            TOPK_PADDED,
            BLOCK,
        )
    begin = split * total // num_splits
    end = (split + 1) * total // num_splits

    if TOKENS > 1:
        # Triton counts the loads of the list as stages of their own.
        for i in tl.range(begin * PARTS, tl.minimum(end, num_whole) * PARTS, num_stages=1 + 2 * AHEAD):
            page = tl.load(union_ptr + i // PARTS)
            rows = (tl.load(union_ptr + TOKENS * TOPK_PADDED + i // PARTS) >> in_tile) & 1 != 0
            first = i % PARTS * BLOCK_N
            k = load_tile(k_ptr, page, k_page_stride, first, k_token_stride, k_offsets, q.dtype)
            products = tl.dot(q, tl.trans(k), input_precision="ieee")
            weights, m_i, alpha = row_weights(products, logit_scale, rows, m_i)
            v = load_tile(v_ptr, page, v_page_stride, first, v_token_stride, v_offsets, q.dtype)
            l_i, acc = accumulate(weights, v, alpha, l_i, acc)
    for i in tl.range(tl.maximum(begin, num_whole) * PARTS, end * PARTS, num_stages=2):
        if TOKENS == 1:
            block = tl.load(ids_ptr + i // PARTS)
            page = live_page(table_ptr + tl.maximum(block, 0), num_pages)
        else:
            block = tl.load(union_ptr + 2 * TOKENS * TOPK_PADDED + i // PARTS)
            page = tl.load(union_ptr + i // PARTS)
        first = i % PARTS * BLOCK_N
        key = block * BLOCK + first + tl.arange(0, BLOCK_N)
        # Past the last token's position may lie garbage, and block -1 has no keys.
        valid = (key >= 0) & (key < position + count)
        k = load_tile_masked(k_ptr, page, k_page_stride, first, k_token_stride, k_offsets, valid, q.dtype)
        sees = (key[None, :] <= (position + in_tile)[:, None]) & valid[None, :]
        if TOKENS > 1:
            rows = (tl.load(union_ptr + TOKENS * TOPK_PADDED + i // PARTS) >> in_tile) & 1 != 0
            sees = sees & rows[:, None]
        logits = tl.where(sees, tl.dot(q, tl.trans(k), input_precision="ieee") * logit_scale, float("-inf"))
        weights, m_i, alpha = masked_weights(logits, m_i)
        v = load_tile_masked(v_ptr, page, v_page_stride, first, v_token_stride, v_offsets, valid, q.dtype)
        l_i, acc = accumulate(weights, v, alpha, l_i, acc)

    acc = finish(l_i, acc, v_scale)
    place = (token * out_token_stride + q_head * out_head_stride)[:, None] * UNIT + channel[None, :]
    if not SPLIT or num_splits == 1:
        tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=live[:, None])
    else:
        mine = tl.program_id(0).to(tl.int64) * PARTIAL_M + offs_m
        o_partial = acc.to(o_partial_ptr.dtype.element_ty)
        tl.store(o_partial_ptr + mine[:, None] * DIM + channel[None, :], o_partial)
        tl.store(lse_ptr + mine, log_sum_exp(m_i, l_i))
        # All threads' results are written before one of them says so; who comes last combines what all have found,
        # always in the same order, and leaves a zero for the next layer.
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr + task, 1, sem="acq_rel") == num_splits - 1:
            first = (tl.program_id(0) - split).to(tl.int64) * PARTIAL_M
            o = _combine(o_partial_ptr + first * DIM, lse_ptr + first, num_splits, BLOCK_M, PARTIAL_M, DIM)
            tl.store(out_ptr + place, o.to(out_ptr.dtype.element_ty), mask=live[:, None])
            tl.store(arrived_ptr + task, 0)


@jit
def _combine(o_partial_ptr, lse_ptr, num_splits, BLOCK_M: tl.constexpr, PARTIAL_M: tl.constexpr, DIM: tl.constexpr):
    """A tile's output from those of all its splits. No load waits for another, so several are on their way."""
    offs_m = tl.arange(0, BLOCK_M)
    row = offs_m[:, None] * DIM + tl.arange(0, DIM)[None, :]
    # What others have written is not in this multiprocessor's first cache.
    m_i = tl.full([BLOCK_M], LOWEST, tl.float32)
    for split in tl.range(0, num_splits, loop_unroll_factor=4):
        m_i = tl.maximum(m_i, tl.load(lse_ptr + split * PARTIAL_M + offs_m, cache_modifier=".cg"))
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM], tl.float32)
    for split in tl.range(0, num_splits, loop_unroll_factor=4 if BLOCK_M <= 16 else 2):
        weight = tl.exp2(tl.load(lse_ptr + split * PARTIAL_M + offs_m, cache_modifier=".cg") - m_i)
        o = tl.load(o_partial_ptr + split * (PARTIAL_M * DIM) + row, cache_modifier=".cg")
        l_i += weight
        acc += weight[:, None] * o.to(tl.float32)
    return finish(l_i, acc, 1.0)


@jit
def _unite(
    ids_ptr, ids_token_stride, table_ptr, num_pages, union_ptr, position, count,
    TOKENS: tl.constexpr, TOPK: tl.constexpr, TOPK_PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """List the blocks that any of ``count`` tokens selected: their pages, a bit for each token, their numbers.

    Those that all tokens see to the end come first, for they need no mask; after them the one or two at the edge.

    Returns:
        How many come first, and how many there are.
    """
    ENTRIES: tl.constexpr = TOKENS * TOPK_PADDED
    block, chosen_by, listed = blocks_of_tile(ids_ptr, ids_token_stride, count, TOKENS, TOPK, TOPK_PADDED)
    edge = position // BLOCK
    is_whole = (listed & (block < edge)).to(tl.int32)
    is_edge = (listed & (block >= edge)).to(tl.int32)
    num_whole = tl.sum(is_whole)
    place = tl.where(block < edge, tl.cumsum(is_whole), num_whole + tl.cumsum(is_edge)) - 1
    page = live_page(table_ptr + tl.where(listed, block, 0), num_pages)
    tl.store(union_ptr + place, page, mask=listed)
    tl.store(union_ptr + ENTRIES + place, chosen_by, mask=listed)
    tl.store(union_ptr + 2 * ENTRIES + place, block, mask=listed)
    tl.debug_barrier()
    return num_whole, num_whole + tl.sum(is_edge)
