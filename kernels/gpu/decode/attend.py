"""Attention of short rows: each block that a row selected is read once, whichever of its tokens chose it.

Programs share out the blocks of a (row, KV head); a second kernel merges what they found by their log-sum-exps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...batch import BLOCK_SIZE, Batch
from .. import arch
from ..fp8 import loadable, widen
from ..rows import STEP_ARGUMENTS

MAX_STACKED = 128
"""Rows of a tile: query tokens times the heads of a group. Longer rows of tokens are cut."""
MAX_SPLITS = 32
"""Programs among which the blocks of a tile are shared out at most, and partial results that are merged."""
PROGRAMS = 2
"""Programs to start for each multiprocessor."""


class Config(NamedTuple):
    num_warps: int
    num_stages: int


CONFIGS = {
    # (compute capability 9 or more, rows of the tile above 32)
    (False, False): Config(4, 2),
    (False, True): Config(8, 1),
    (True, False): Config(4, 2),
    (True, True): Config(8, 2),
}


def sparse_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_ids: Tensor,
    batch: Batch,
    *,
    scale: float,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """As :func:`msa_backend.kernels.api.sparse_attention`, for rows of up to 16 query tokens."""
    if out is None:
        out = torch.empty_like(q)
    num_tokens, num_heads, dim = q.shape
    if q.numel() == 0:
        return out
    if batch.block_table.numel() == 0:
        return out.zero_()
    device = q.device
    num_kv_heads = k_pages.shape[1]
    topk = block_ids.shape[2]
    group = num_heads // num_kv_heads
    group_padded = triton.next_power_of_2(group)
    tokens = triton.next_power_of_2(max(1, batch.max_query_len))
    tile_tokens = min(tokens, max(1, MAX_STACKED // group_padded))
    tiles = tokens // tile_tokens
    most_blocks = min(tile_tokens * topk, max(1, triton.cdiv(batch.max_seq_len, BLOCK_SIZE)))
    tasks = batch.num_seqs * num_kv_heads * tiles
    splits = min(triton.cdiv(PROGRAMS * arch.num_sms(device), tasks), most_blocks, MAX_SPLITS)
    share = triton.cdiv(tile_tokens * topk, splits)
    unions = block_ids
    if tile_tokens > 1:
        unions = torch.empty(tasks * splits, 2, share, dtype=torch.int32, device=device)
    partial, lse = out, out
    if splits > 1:
        partial = torch.empty(splits, num_tokens, num_heads, dim, dtype=torch.float32, device=device)
        lse = torch.empty(splits, num_tokens, num_heads, dtype=torch.float32, device=device)
    stacked = max(16, tile_tokens * group_padded)
    config = CONFIGS[arch.capability(device) >= (9, 0), stacked > 32]
    k_pages, v_pages = loadable(k_pages), loadable(v_pages)
    _attend_rows[(splits, num_kv_heads * tiles, batch.num_seqs)](
        q,
        k_pages,
        v_pages,
        block_ids,
        out,
        unions,
        partial,
        lse,
        batch.cu_seqlens_q,
        batch.seq_lens,
        batch.context_lens,
        batch.block_table,
        scale * k_scale * 1.4426950408889634,
        v_scale,
        num_tokens,
        q.stride(0),
        q.stride(1),
        *k_pages.stride()[:3],
        *v_pages.stride()[:3],
        block_ids.stride(0),
        block_ids.stride(1),
        out.stride(0),
        out.stride(1),
        out.stride(2),
        batch.block_table.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        GROUP_PADDED=group_padded,
        TILE_TOKENS=tile_tokens,
        STACKED=stacked,
        TOPK=topk,
        TOPK_PADDED=triton.next_power_of_2(topk),
        SPLITS=splits,
        SHARE=share,
        DIM=dim,
        BLOCK=BLOCK_SIZE,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if splits > 1:
        _merge[(num_tokens, num_heads)](
            partial,
            lse,
            out,
            batch.cu_seqlens_q,
            batch.num_seqs,
            num_tokens,
            out.stride(0),
            out.stride(1),
            out.stride(2),
            NUM_HEADS=num_heads,
            SPLITS=splits,
            SPLITS_PADDED=triton.next_power_of_2(splits),
            DIM=dim,
            num_warps=2,
        )
    return out


@triton.jit(do_not_specialize=STEP_ARGUMENTS)
def _attend_rows(
    q,
    k_pages,
    v_pages,
    block_ids,
    out,
    unions,
    partial,
    lse,
    cu_seqlens_q,
    seq_lens,
    context_lens,
    block_table,
    logit_scale,
    v_scale,
    num_tokens,
    q_token_stride,
    q_head_stride,
    k_page_stride,
    k_head_stride,
    k_token_stride,
    v_page_stride,
    v_head_stride,
    v_token_stride,
    ids_head_stride,
    ids_token_stride,
    out_token_stride,
    out_head_stride,
    out_channel_stride,
    table_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    STACKED: tl.constexpr,
    TOPK: tl.constexpr,
    TOPK_PADDED: tl.constexpr,
    SPLITS: tl.constexpr,
    SHARE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    split = tl.program_id(0)
    kv_head = tl.program_id(1) % NUM_KV_HEADS
    tile = tl.program_id(1) // NUM_KV_HEADS
    row = tl.program_id(2)
    start = tl.load(cu_seqlens_q + row)
    query_len = tl.load(cu_seqlens_q + row + 1) - start
    context_len = tl.load(context_lens + row)
    seq_len = tl.load(seq_lens + row)
    first = tile * TILE_TOKENS

    stacked = tl.arange(0, STACKED)
    channel = tl.arange(0, DIM)
    head = kv_head * GROUP + stacked % GROUP_PADDED
    is_head = stacked % GROUP_PADDED < GROUP
    if (SPLITS == 1) & (tile == 0):
        # The tokens after the last row are nobody's; the rows share them out.
        tail = tl.load(cu_seqlens_q + tl.num_programs(2)) + row
        for i in range(tl.cdiv(num_tokens - tail, tl.num_programs(2))):
            token = (tail + i * tl.num_programs(2)).to(tl.int64)
            place = token * out_token_stride + head[:, None] * out_head_stride
            place += channel[None, :] * out_channel_stride
            zeros = tl.zeros([STACKED, DIM], out.dtype.element_ty)
            tl.store(out + place, zeros, mask=(is_head & (stacked < GROUP_PADDED))[:, None])
    if first >= query_len:
        return
    tile_token = stacked // GROUP_PADDED
    offset = first + tile_token
    live = is_head & (offset < query_len) & (tile_token < TILE_TOKENS)
    token = (start + offset).to(tl.int64)
    position = tl.where(live, context_len + offset, -1)
    tokens_q = tl.load(
        q + (token * q_token_stride + head * q_head_stride)[:, None] + channel[None, :], mask=live[:, None], other=0.0
    )
    if tokens_q.dtype != k_pages.dtype.element_ty and k_pages.dtype.element_ty.primitive_bitwidth > 8:
        tokens_q = tokens_q.to(tl.float32)

    ids = block_ids + kv_head.to(tl.int64) * ids_head_stride + (start + first).to(tl.int64) * ids_token_stride
    if TILE_TOKENS == 1:
        shared_out = ids
        begin = split * SHARE
        end = tl.minimum(begin + SHARE, TOPK)
    else:
        program = (row * tl.num_programs(1) + tl.program_id(1)) * SPLITS + split
        shared_out = unions + program.to(tl.int64) * 2 * SHARE
        count = _share_of_union(
            ids, ids_token_stride, query_len - first, split, shared_out, TILE_TOKENS, TOPK, TOPK_PADDED, SPLITS, SHARE
        )
        begin = 0
        end = count

    key = tl.arange(0, BLOCK)
    k_offsets = kv_head.to(tl.int64) * k_head_stride + key[:, None] * k_token_stride + channel[None, :]
    v_offsets = kv_head.to(tl.int64) * v_head_stride + key[:, None] * v_token_stride + channel[None, :]
    table = block_table + row.to(tl.int64) * table_stride
    acc = tl.zeros([STACKED, DIM], tl.float32)
    best = tl.full([STACKED], float("-inf"), tl.float32)
    total = tl.zeros([STACKED], tl.float32)
    for i in range(begin, end):
        block = tl.load(shared_out + i)
        page = tl.load(table + tl.maximum(block, 0)).to(tl.int64)
        key_position = block * BLOCK + key
        inside = (key_position >= 0) & (key_position < seq_len)  # block -1 has no keys
        k = tl.load(k_pages + page * k_page_stride + k_offsets, mask=inside[:, None], other=0.0)
        logits = tl.dot(tokens_q, tl.trans(widen(k, tokens_q.dtype)), input_precision="ieee") * logit_scale
        sees = inside[None, :] & (key_position[None, :] <= position[:, None])
        if TILE_TOKENS > 1:
            chosen_by = tl.load(shared_out + SHARE + i)
            sees = sees & ((chosen_by >> tile_token) & 1 != 0)[:, None]
        logits = tl.where(sees, logits, float("-inf"))
        new_best = tl.maximum(best, tl.max(logits, axis=1))
        # A token that has seen nothing yet has no best; any number will do for the difference.
        reference = tl.where(new_best == float("-inf"), 0.0, new_best)
        weights = tl.exp2(logits - reference[:, None])
        decay = tl.exp2(best - reference)
        total = total * decay + tl.sum(weights, axis=1)
        v = tl.load(v_pages + page * v_page_stride + v_offsets, mask=inside[:, None], other=0.0)
        v = widen(v, tokens_q.dtype)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        best = new_best
    some = total > 0
    acc = acc * tl.where(some, v_scale / tl.where(some, total, 1.0), 0.0)[:, None]
    if SPLITS == 1:
        place = token[:, None] * out_token_stride + head[:, None] * out_head_stride
        place += channel[None, :] * out_channel_stride
        tl.store(out + place, acc.to(out.dtype.element_ty), mask=live[:, None])
    else:
        place = (split * num_tokens + token) * NUM_HEADS + head
        tl.store(partial + place[:, None] * DIM + channel[None, :], acc, mask=live[:, None])
        tl.store(lse + place, tl.where(some, best + tl.log2(total), float("-inf")), mask=live)


@triton.jit
def _share_of_union(
    ids,
    ids_token_stride,
    num_tokens,
    split,
    shared_out,
    TILE_TOKENS: tl.constexpr,
    TOPK: tl.constexpr,
    TOPK_PADDED: tl.constexpr,
    SPLITS: tl.constexpr,
    SHARE: tl.constexpr,
):
    """List this split's share of the different blocks of a few tokens, with a bit for each token that chose it.

    Writes block numbers to ``shared_out[:count]`` and bits to ``shared_out[SHARE : SHARE + count]``. Returns count.
    """
    entry = tl.arange(0, TILE_TOKENS * TOPK_PADDED)
    owner = entry // TOPK_PADDED
    slot = tl.arange(0, TOPK_PADDED)
    block = tl.load(
        ids + owner * ids_token_stride + entry % TOPK_PADDED,
        mask=(owner < num_tokens) & (entry % TOPK_PADDED < TOPK),
        other=-1,
    )
    chosen_by = tl.zeros([TILE_TOKENS * TOPK_PADDED], tl.int32)
    for other in range(TILE_TOKENS):
        slots = tl.where(num_tokens > other, TOPK, 0)
        of_other = tl.load(ids + other * ids_token_stride + slot, mask=slot < slots, other=-1)
        equal = tl.max((block[:, None] == of_other[None, :]).to(tl.int32), axis=1)
        chosen_by |= equal << other
    # A block is listed by the first of the tokens that chose it.
    first = ((block >= 0) & ((chosen_by & ((1 << owner) - 1)) == 0)).to(tl.int32)
    total = tl.sum(first)
    begin = split * total // SPLITS
    count = (split + 1) * total // SPLITS - begin
    rank = tl.cumsum(first) - 1 - begin
    mine = (first != 0) & (rank >= 0) & (rank < count)
    tl.store(shared_out + rank, block, mask=mine)
    tl.store(shared_out + SHARE + rank, chosen_by, mask=mine)
    tl.debug_barrier()
    return count


@triton.jit(do_not_specialize=STEP_ARGUMENTS)
def _merge(
    partial,
    lse,
    out,
    cu_seqlens_q,
    num_seqs,
    num_tokens,
    out_token_stride,
    out_head_stride,
    out_channel_stride,
    NUM_HEADS: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    DIM: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    split = tl.arange(0, SPLITS_PADDED)
    channel = tl.arange(0, DIM)
    # Nobody wrote partial results of the tokens after the last row.
    written = split < tl.where(token < tl.load(cu_seqlens_q + num_seqs), SPLITS, 0)
    place = (split * num_tokens + token) * NUM_HEADS + head
    sizes = tl.load(lse + place, mask=written, other=float("-inf"))
    best = tl.max(sizes, axis=0)
    weights = tl.exp2(sizes - tl.where(best == float("-inf"), 0.0, best))
    weights = weights / tl.maximum(tl.sum(weights, axis=0), 1e-30)
    values = tl.load(partial + place[:, None] * DIM + channel[None, :], mask=written[:, None], other=0.0)
    merged = tl.sum(values * weights[:, None], axis=0)
    place = token * out_token_stride + head * out_head_stride + channel * out_channel_stride
    tl.store(out + place, merged.to(out.dtype.element_ty))
