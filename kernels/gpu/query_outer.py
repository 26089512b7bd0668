"""Attention, queries outer: a few neighbouring tokens walk over the union of the blocks that they selected.

Decode, drafts to verify, short suffixes, in any mix, and the tokens near the start of a long prompt. A *tile* is up to
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
from .launch import Options, kernel
from .pages import Pages, units
from .pdl import let_next_start, wait_for_previous
from .plan import NUM_SPLITS, NUM_TILES, Plan
from .sizes import next_power_of_2
from .softmax import accumulate, finish, log_sum_exp, masked_weights, row_weights, start_softmax
from .tiles import UNIT, head_offsets, live_page, load_tile, load_tile_masked

BLOCK_M = 64
"""Rows of a tile: tokens times the padded query heads of a group."""
SMALL_M = 16
"""Rows of a tile of so few tokens that more would be padding: a decode step's."""
MAX_TILE_TOKENS = 16
WARP = tl.constexpr(32)


class Config(NamedTuple):
    block_n: int
    """Keys of a block that are worked on at a time."""
    num_warps: int
    num_stages: int


DECODE = Config(128, 4, 2)
"""Of steps whose tiles are all small."""
MIXED = Config(64, 4, 3)


def tile_tokens(group: int) -> int:
    """Tokens of a tile of this many query heads to a KV head."""
    return max(1, min(MAX_TILE_TOKENS, BLOCK_M // next_power_of_2(group)))


def small_tokens(group: int) -> int:
    """Tokens of a small tile; 0 if a group alone is larger."""
    return min(tile_tokens(group), SMALL_M // next_power_of_2(group))


def tokens_of_a_tile(group: int, batch: Batch) -> int:
    """Of the tiles of this step."""
    small = small_tokens(group)
    return small if batch.max_query_len <= small else tile_tokens(group)


def programs(device: torch.device) -> int:
    """Programs that the chip runs at once."""
    return 2 * arch.num_sms(device)


def attend_query_outer(
    q: Tensor, caches: LayerCaches, block_ids: Tensor, batch: Batch, plan: Plan, scale: float, out: Tensor
) -> None:
    """Write ``out`` of the tokens in the plan's tiles, and zeros for padding; no others.

    Shapes are those of :func:`msa_backend.kernels.api.sparse_attention`.
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
    entries = plan.shape.tile_tokens * next_power_of_2(topk)
    partial = min(plan.max_programs, plan.shape.programs) * block_m if splits else 1
    union = plan.hold("union", plan.max_programs * 3 * entries, torch.int32)
    o_partial = plan.hold("o_partial", partial * dim, torch.float32)
    lse = plan.hold("lse", partial, torch.float32)
    dependent = pdl.available(q.device)
    msa_query_outer(
        (plan.max_programs,),
        (
            q, pages.k, pages.v, block_ids, out, union, o_partial, lse,
            plan.counts, plan.tiles, plan.arrived, plan.token_pos, batch.block_table,
            scale * pages.logit_scale, pages.v_scale, num_tokens, pages.num_pages,
            *units("q", q.stride()[:2]), *pages.kv_strides, block_ids.stride(0), block_ids.stride(1),
            *units("out", out.stride()[:2]), batch.block_table.stride(0),
        ),
        (
            num_heads, num_kv_heads, group, group_padded, large, small, only_small, topk, next_power_of_2(topk), splits,
            dim, BLOCK_SIZE, block_m, block_n, next_power_of_2(num_heads), SMALL_M, dependent,
        ),
        Options(config.num_warps, config.num_stages, dependent),
    )  # fmt: skip


@kernel(unaligned=("block_table_ptr", "block_ids_ptr"))
def msa_query_outer(
    q_ptr, k_ptr, v_ptr, block_ids_ptr, out_ptr, union_ptr, o_partial_ptr, lse_ptr,
    counts_ptr, tiles_ptr, arrived_ptr, token_pos_ptr, block_table_ptr,
    logit_scale, v_scale, num_tokens, num_pages,
    q_token_stride, q_head_stride, k_page_stride, k_head_stride, k_token_stride,
    v_page_stride, v_head_stride, v_token_stride, ids_head_stride, ids_token_stride,
    out_token_stride, out_head_stride, table_stride,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr,
    TILE_TOKENS: tl.constexpr, SMALL_TOKENS: tl.constexpr, ONLY_SMALL: tl.constexpr, TOPK: tl.constexpr,
    TOPK_PADDED: tl.constexpr, SPLIT: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, HEADS_PADDED: tl.constexpr, SMALL_M: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous(PDL)
    let_next_start(PDL)
    program = tl.program_id(0)
    num_splits = tl.load(counts_ptr + NUM_SPLITS)
    split = program % num_splits
    head = program // num_splits % NUM_KV_HEADS
    # The last of a sequence's tiles have the most blocks: the longest first.
    tile = tl.load(counts_ptr + NUM_TILES) - 1 - program // num_splits // NUM_KV_HEADS
    if tile >= 0:
        seq = tl.load(tiles_ptr + tile * 4)
        first_token = tl.load(tiles_ptr + tile * 4 + 1)
        count = tl.load(tiles_ptr + tile * 4 + 2)
        position = tl.load(tiles_ptr + tile * 4 + 3)
        ids_ptr = block_ids_ptr + head.to(tl.int64) * ids_head_stride + first_token.to(tl.int64) * ids_token_stride
        table_ptr = block_table_ptr + seq.to(tl.int64) * table_stride
        if SMALL_TOKENS > 0 and (ONLY_SMALL or count <= SMALL_TOKENS):
            _attend_tile(
                q_ptr, k_ptr, v_ptr, ids_ptr, out_ptr, union_ptr, o_partial_ptr, lse_ptr, arrived_ptr, table_ptr,
                logit_scale, v_scale, num_pages, q_token_stride, q_head_stride, k_page_stride, k_head_stride,
                k_token_stride, v_page_stride, v_head_stride, v_token_stride, ids_token_stride, out_token_stride,
                out_head_stride, split, num_splits, head, tile * NUM_KV_HEADS + head, first_token, count, position,
                GROUP, GROUP_PADDED, SMALL_TOKENS, TOPK, TOPK_PADDED, SPLIT, DIM, BLOCK, SMALL_M, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        elif not ONLY_SMALL:
            _attend_tile(
                q_ptr, k_ptr, v_ptr, ids_ptr, out_ptr, union_ptr, o_partial_ptr, lse_ptr, arrived_ptr, table_ptr,
                logit_scale, v_scale, num_pages, q_token_stride, q_head_stride, k_page_stride, k_head_stride,
                k_token_stride, v_page_stride, v_head_stride, v_token_stride, ids_token_stride, out_token_stride,
                out_head_stride, split, num_splits, head, tile * NUM_KV_HEADS + head, first_token, count, position,
                GROUP, GROUP_PADDED, TILE_TOKENS, TOPK, TOPK_PADDED, SPLIT, DIM, BLOCK, BLOCK_M, BLOCK_M, BLOCK_N,
            )  # fmt: skip
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
    TOPK_PADDED: tl.constexpr, SPLIT: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
    PARTIAL_M: tl.constexpr, BLOCK_N: tl.constexpr,
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

    # The union: a block is listed by the first of the tokens that selected it. Blocks that all tokens see to the end
    # come first, without a mask; after them the one or two at the edge.
    ENTRIES: tl.constexpr = TOKENS * TOPK_PADDED
    entry = tl.arange(0, ENTRIES)
    owner = entry // TOPK_PADDED
    slot = entry % TOPK_PADDED
    block = tl.load(ids_ptr + owner * ids_token_stride + slot, mask=(owner < count) & (slot < TOPK), other=-1)
    listed = block >= 0
    chosen_by = entry * 0 + 1
    if TOKENS > 1:
        chosen_by = entry * 0
        other_slot = tl.arange(0, TOPK_PADDED)
        for other in range(count):
            of_other = tl.load(ids_ptr + other * ids_token_stride + other_slot, mask=other_slot < TOPK, other=-2)
            chosen_by |= tl.max((block[:, None] == of_other[None, :]).to(tl.int32), axis=1) << other
        listed = listed & ((chosen_by & ((1 << owner) - 1)) == 0)
    edge = position // BLOCK
    is_whole = (listed & (block < edge)).to(tl.int32)
    is_edge = (listed & (block >= edge)).to(tl.int32)
    num_whole = tl.sum(is_whole)
    total = num_whole + tl.sum(is_edge)
    rank = tl.where(block < edge, tl.cumsum(is_whole), num_whole + tl.cumsum(is_edge)) - 1
    rank = tl.where(listed, rank, -1)
    page = live_page(table_ptr + tl.where(listed, block, 0), num_pages)
    union_ptr += tl.program_id(0).to(tl.int64) * (3 * ENTRIES)
    if ENTRIES > WARP:
        tl.store(union_ptr + rank, page, mask=listed)
        tl.store(union_ptr + ENTRIES + rank, chosen_by, mask=listed)
        tl.store(union_ptr + 2 * ENTRIES + rank, block, mask=listed)
        tl.debug_barrier()
    begin = split * total // num_splits
    end = (split + 1) * total // num_splits

    PARTS: tl.constexpr = BLOCK // BLOCK_N
    k_offsets = head_offsets(head, k_head_stride, k_token_stride, BLOCK_N, DIM)
    v_offsets = head_offsets(head, v_head_stride, v_token_stride, BLOCK_N, DIM)
    m_i, l_i, acc = start_softmax(BLOCK_M, DIM)
    for i in range(begin * PARTS, tl.minimum(end, num_whole) * PARTS):
        here = _nth(union_ptr, page, rank, i // PARTS, ENTRIES)
        first = i % PARTS * BLOCK_N
        k = load_tile(k_ptr, here, k_page_stride, first, k_token_stride, k_offsets, q.dtype)
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
        rows = in_tile >= 0
        if TOKENS > 1:
            rows = (_nth(union_ptr + ENTRIES, chosen_by, rank, i // PARTS, ENTRIES) >> in_tile) & 1 != 0
        weights, m_i, alpha = row_weights(products, logit_scale, rows, m_i)
        v = load_tile(v_ptr, here, v_page_stride, first, v_token_stride, v_offsets, q.dtype)
        l_i, acc = accumulate(weights, v, alpha, l_i, acc)
    for i in range(tl.maximum(begin, num_whole) * PARTS, end * PARTS):
        here = _nth(union_ptr, page, rank, i // PARTS, ENTRIES)
        first = i % PARTS * BLOCK_N
        key = _nth(union_ptr + 2 * ENTRIES, block, rank, i // PARTS, ENTRIES) * BLOCK + first + tl.arange(0, BLOCK_N)
        # Past the last token's position may lie garbage.
        valid = key < position + count
        k = load_tile_masked(k_ptr, here, k_page_stride, first, k_token_stride, k_offsets, valid, q.dtype)
        sees = (key[None, :] <= (position + in_tile)[:, None]) & valid[None, :]
        if TOKENS > 1:
            rows = (_nth(union_ptr + ENTRIES, chosen_by, rank, i // PARTS, ENTRIES) >> in_tile) & 1 != 0
            sees = sees & rows[:, None]
        logits = tl.where(sees, tl.dot(q, tl.trans(k), input_precision="ieee") * logit_scale, float("-inf"))
        weights, m_i, alpha = masked_weights(logits, m_i)
        v = load_tile_masked(v_ptr, here, v_page_stride, first, v_token_stride, v_offsets, valid, q.dtype)
        l_i, acc = accumulate(weights, v, alpha, l_i, acc)

    acc = finish(l_i, acc, v_scale)
    place = (token * out_token_stride + q_head * out_head_stride)[:, None] * UNIT + channel[None, :]
    if not SPLIT or num_splits == 1:
        tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=live[:, None])
    else:
        mine = tl.program_id(0).to(tl.int64) * PARTIAL_M + offs_m
        tl.store(o_partial_ptr + mine[:, None] * DIM + channel[None, :], acc)
        tl.store(lse_ptr + mine, log_sum_exp(m_i, l_i))
        # All threads' results are written before one of them says so; who comes last combines what all have found,
        # always in the same order, and leaves a zero for the next layer.
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr + task, 1, sem="acq_rel") == num_splits - 1:
            m_i, l_i, acc = start_softmax(BLOCK_M, DIM)
            for other in range(num_splits):
                theirs = mine + (other - split) * PARTIAL_M
                lse = tl.load(lse_ptr + theirs, cache_modifier=".cg")
                o_partial = tl.load(o_partial_ptr + theirs[:, None] * DIM + channel[None, :], cache_modifier=".cg")
                m_new = tl.maximum(m_i, lse)
                alpha = tl.exp2(m_i - m_new)
                weight = tl.exp2(lse - m_new)
                acc = acc * alpha[:, None] + o_partial * weight[:, None]
                l_i = l_i * alpha + weight
                m_i = m_new
            combined = finish(l_i, acc, 1.0)
            tl.store(out_ptr + place, combined.to(out_ptr.dtype.element_ty), mask=live[:, None])
            tl.store(arrived_ptr + task, 0)


@jit
def _nth(list_ptr, values, rank, i, ENTRIES: tl.constexpr):
    """The value of rank ``i``: of few from registers, where a warp holds them all; of more from memory."""
    if ENTRIES > WARP:
        value = tl.load(list_ptr + i)
    else:
        value = tl.sum(tl.where(rank == i, values, 0))
    return value
