"""Attention of short rows: each block that a row selected is read once, whichever of its tokens chose it.

Programs share out the blocks of a (row, KV head); a second kernel merges what they found by their log-sum-exps.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...batch import BLOCK_SIZE, Batch
from .. import arch, pdl, tma
from ..fp8 import loadable, widen
from ..pdl import let_next_start, wait_for_previous
from ..rows import STEP_ARGUMENTS, live_page
from ..sizes import ceil_div, next_power_of_2

MAX_SPLITS = 32
"""Programs among which the blocks of a tile are shared out at most, and partial results that are merged."""


class Config(NamedTuple):
    rows: int
    """Of a tile: query tokens times the padded heads of a group. A row of more tokens is cut."""
    keys: int
    """Of a block, taken at a time."""
    num_warps: int
    num_stages: int
    programs: int = 2
    """Programs that fit on a multiprocessor."""


DECODE = Config(rows=16, keys=128, num_warps=4, num_stages=2)
"""For rows of one token."""
VERIFY = {
    False: [(10, Config(64, 64, 4, 2)), (math.inf, Config(32, 64, 4, 2))],
    True: [
        (0.5, Config(64, 32, 4, 5)),
        (10, Config(128, 64, 8, 5, programs=1)),
        (math.inf, Config(32, 128, 4, 3, programs=3)),
    ],
}
"""For rows of several tokens, by whether the compute capability is 9 or more, and by the longest context in units of
top-k blocks. In short ones the tokens choose mostly the same blocks: large tiles read each fewer times. In long ones
small tiles compute less in vain."""


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
    dependent = pdl.available(device)
    num_kv_heads = k_pages.shape[1]
    topk = block_ids.shape[2]
    group = num_heads // num_kv_heads
    group_padded = next_power_of_2(group)
    hopper = arch.capability(device) >= (9, 0)
    max_blocks = max(1, min(ceil_div(batch.max_seq_len, BLOCK_SIZE), batch.block_table.shape[1]))
    config = DECODE
    if batch.max_query_len > 1:
        config = next(config for limit, config in VERIFY[hopper] if max_blocks <= limit * topk)
    # What fits for 128 channels of 16 bits.
    heavier = max(1, dim * max(q.element_size(), k_pages.element_size()) // 256)
    config = config._replace(rows=max(16, config.rows // heavier), keys=max(16, config.keys // heavier))
    tokens = next_power_of_2(max(1, batch.max_query_len))
    tile_tokens = min(tokens, max(1, config.rows // group_padded))
    tiles = tokens // tile_tokens
    stacked = max(16, tile_tokens * group_padded)
    tasks = batch.num_seqs * num_kv_heads * tiles
    # As many programs as run at once. One more, and it would start when all others end.
    splits = config.programs * arch.num_sms(device) // tasks
    splits = max(1, min(splits, tile_tokens * topk, max_blocks, MAX_SPLITS))
    # Two blocks at most are not seen whole by all the tokens.
    share = ceil_div(tile_tokens * topk + (2 if tile_tokens > 1 else 0), splits)
    unions = block_ids  # one token's blocks are listed already
    if tile_tokens > 1:
        unions = torch.empty(tasks * splits, 2, share, dtype=torch.int32, device=device)
    partial, lse = out, out
    if splits > 1:
        partial = torch.empty(splits, num_tokens, num_heads, dim, dtype=torch.float32, device=device)
        lse = torch.empty(splits, num_tokens, num_heads, dtype=torch.float32, device=device)
    k_pages, v_pages = loadable(k_pages), loadable(v_pages)
    k_tiles = v_tiles = None
    if tile_tokens > 1:
        k_tiles, v_tiles = (tma.descriptor(x, [1, 1, config.keys, dim]) for x in (k_pages, v_pages))
    use_tma = k_tiles is not None and v_tiles is not None
    _attend_rows[(splits, num_kv_heads * tiles, batch.num_seqs)](
        q,
        k_tiles if use_tma else k_pages,
        v_tiles if use_tma else v_pages,
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
        scale * k_scale * math.log2(math.e),
        v_scale,
        num_tokens,
        k_pages.shape[0],
        share,
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
        TOPK_PADDED=next_power_of_2(topk),
        SPLIT=splits > 1,
        DIM=dim,
        BLOCK=BLOCK_SIZE,
        KEYS=config.keys,
        TMA=use_tma,
        PDL=dependent,
        launch_pdl=dependent,
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
            splits,
            out.stride(0),
            out.stride(1),
            out.stride(2),
            NUM_HEADS=num_heads,
            MAX_SPLITS=MAX_SPLITS,
            DIM=dim,
            PDL=dependent,
            launch_pdl=dependent,
            num_warps=2,
        )
    return out


@triton.jit(do_not_specialize=STEP_ARGUMENTS)
def _attend_rows(
    q,
    k_tiles,
    v_tiles,
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
    num_pages,
    share,
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
    SPLIT: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    let_next_start(PDL)
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
    if (not SPLIT) & (tile == 0):
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
    table = block_table + row.to(tl.int64) * table_stride
    key = tl.arange(0, KEYS)
    PARTS: tl.constexpr = BLOCK // KEYS
    k_head = k_pages + kv_head.to(tl.int64) * k_head_stride + key[:, None] * k_token_stride + channel[None, :]
    v_head = v_pages + kv_head.to(tl.int64) * v_head_stride + key[:, None] * v_token_stride + channel[None, :]
    acc = tl.zeros([STACKED, DIM], tl.float32)
    best = tl.full([STACKED], float("-inf"), tl.float32)
    total = tl.zeros([STACKED], tl.float32)
    if TILE_TOKENS == 1:
        begin = split * share
        end = tl.minimum(begin + share, TOPK)
        first_edge = 0
    else:
        # Blocks that every token sees to the end come first, without a mask; the one or two at the edge after them.
        first_edge = tl.maximum(tl.minimum(context_len + first, seq_len), 0) // BLOCK
        visible = tl.minimum(context_len + tl.minimum(first + TILE_TOKENS, query_len), seq_len)
        edges = tl.maximum(tl.cdiv(visible, BLOCK) - first_edge, 0)
        program = (row * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + split
        union = unions + program.to(tl.int64) * 2 * share
        whole, begin, end = _share_of_union(
            ids, ids_token_stride, query_len - first, table, num_pages, first_edge, edges, split, union,
            share, TILE_TOKENS, TOPK, TOPK_PADDED,
        )  # fmt: skip
        for i in range(whole * PARTS):
            page = tl.load(union + i // PARTS)
            chosen = (tl.load(union + share + i // PARTS) >> tile_token) & 1 != 0
            part = i % PARTS * KEYS
            if TMA:
                k = k_tiles.load([page, kv_head, part, 0]).reshape(KEYS, DIM)
            else:
                k = tl.load(k_head + page.to(tl.int64) * k_page_stride + part * k_token_stride)
            logits = tl.dot(tokens_q, tl.trans(widen(k, tokens_q.dtype)), input_precision="ieee")
            new_best = tl.where(chosen, tl.maximum(best, tl.max(logits, axis=1) * logit_scale), best)
            # Nothing is left of a token's weights when infinity is subtracted.
            weights = tl.exp2(logits * logit_scale - tl.where(chosen, new_best, float("inf"))[:, None])
            decay = tl.exp2(best - tl.where(new_best == float("-inf"), 0.0, new_best))
            total = total * decay + tl.sum(weights, axis=1)
            if TMA:
                v = v_tiles.load([page, kv_head, part, 0]).reshape(KEYS, DIM)
            else:
                v = tl.load(v_head + page.to(tl.int64) * v_page_stride + part * v_token_stride)
            v = widen(v, tokens_q.dtype)
            acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
            best = new_best
    for i in range(begin * PARTS, end * PARTS):
        if TILE_TOKENS == 1:
            block = tl.load(ids + i // PARTS)
        else:
            block = first_edge + i // PARTS
        page = live_page(table + tl.maximum(block, 0), num_pages)
        part = i % PARTS * KEYS
        key_position = block * BLOCK + part + key
        inside = (key_position >= 0) & (key_position < seq_len)  # block -1 has no keys
        if TMA:
            k = k_tiles.load([page, kv_head, part, 0]).reshape(KEYS, DIM)
        else:
            k_part = k_head + page.to(tl.int64) * k_page_stride + part * k_token_stride
            k = tl.load(k_part, mask=inside[:, None], other=0.0)
        logits = tl.dot(tokens_q, tl.trans(widen(k, tokens_q.dtype)), input_precision="ieee") * logit_scale
        sees = inside[None, :] & (key_position[None, :] <= position[:, None])
        if TILE_TOKENS > 1:
            slot = tl.arange(0, TOPK_PADDED)
            chosen_ids = tl.load(
                ids + tile_token[:, None] * ids_token_stride + slot[None, :],
                mask=live[:, None] & (slot < TOPK)[None, :],
                other=-1,
            )
            sees = sees & (tl.max((chosen_ids == block).to(tl.int32), axis=1) != 0)[:, None]
        logits = tl.where(sees, logits, float("-inf"))
        new_best = tl.maximum(best, tl.max(logits, axis=1))
        # A token that has seen nothing yet has no best; any number will do for the difference.
        reference = tl.where(new_best == float("-inf"), 0.0, new_best)
        weights = tl.exp2(logits - reference[:, None])
        decay = tl.exp2(best - reference)
        total = total * decay + tl.sum(weights, axis=1)
        if TMA:
            v = v_tiles.load([page, kv_head, part, 0]).reshape(KEYS, DIM)
            v = tl.where(inside[:, None], widen(v, tokens_q.dtype), 0.0)
        else:
            v_part = v_head + page.to(tl.int64) * v_page_stride + part * v_token_stride
            v = tl.load(v_part, mask=inside[:, None], other=0.0)
            v = widen(v, tokens_q.dtype)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        best = new_best
    some = total > 0
    acc = acc * tl.where(some, v_scale / tl.where(some, total, 1.0), 0.0)[:, None]
    if not SPLIT:
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
    table,
    num_pages,
    first_edge,
    edges,
    split,
    union,
    share,
    TILE_TOKENS: tl.constexpr,
    TOPK: tl.constexpr,
    TOPK_PADDED: tl.constexpr,
):
    """List this split's share of the different blocks of a few tokens, with a bit for each token that chose it.

    Of the blocks before ``first_edge``, and the ``edges`` that follow those in the order of work. Writes their pages
    to ``union[:whole]`` and the bits to ``union[share : share + whole]``. Returns ``whole`` and the range of the edges.
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
    first = ((block >= 0) & (block < first_edge) & ((chosen_by & ((1 << owner) - 1)) == 0)).to(tl.int32)
    total = tl.sum(first)
    begin = split * (total + edges) // tl.num_programs(0)
    end = (split + 1) * (total + edges) // tl.num_programs(0)
    whole = tl.minimum(end, total) - tl.minimum(begin, total)
    rank = tl.cumsum(first) - 1 - begin
    mine = (first != 0) & (rank >= 0) & (rank < whole)
    page = live_page(table + tl.where(mine, block, 0), num_pages)
    tl.store(union + rank, page, mask=mine)
    tl.store(union + share + rank, chosen_by, mask=mine)
    tl.debug_barrier()
    return whole, tl.maximum(begin, total) - total, tl.maximum(end, total) - total


@triton.jit(do_not_specialize=STEP_ARGUMENTS)
def _merge(
    partial,
    lse,
    out,
    cu_seqlens_q,
    num_seqs,
    num_tokens,
    splits,
    out_token_stride,
    out_head_stride,
    out_channel_stride,
    NUM_HEADS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    DIM: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    let_next_start(PDL)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    split = tl.arange(0, MAX_SPLITS)
    channel = tl.arange(0, DIM)
    # Nobody wrote partial results of the tokens after the last row.
    written = split < tl.where(token < tl.load(cu_seqlens_q + num_seqs), splits, 0)
    place = (split * num_tokens + token) * NUM_HEADS + head
    sizes = tl.load(lse + place, mask=written, other=float("-inf"))
    best = tl.max(sizes, axis=0)
    weights = tl.exp2(sizes - tl.where(best == float("-inf"), 0.0, best))
    weights = weights / tl.maximum(tl.sum(weights, axis=0), 1e-30)
    values = tl.load(partial + place[:, None] * DIM + channel[None, :], mask=written[:, None], other=0.0)
    merged = tl.sum(values * weights[:, None], axis=0)
    place = token * out_token_stride + head * out_head_stride + channel * out_channel_stride
    tl.store(out + place, merged.to(out.dtype.element_ty))
