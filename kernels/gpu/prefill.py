"""Attention of long rows, KV outer: load a block's K and V once and stream the queries that chose it through them.

Each (token, selected block) leaves a normalised partial output and its log-sum-exp; a second kernel combines them.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..batch import BLOCK_SIZE, Batch
from .invert import _TOKEN_BITS, _TOKEN_MASK, invert

CONFIG = {"rows": 128, "num_warps": 8, "num_stages": 2, "item_tokens": 64}


def sparse_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_ids: Tensor,
    batch: Batch,
    *,
    scale: float,
    k_scale: float,
    v_scale: float,
    out: Tensor,
) -> None:
    """See :func:`msa_backend.kernels.api.sparse_attention`."""
    num_tokens, num_heads, dim = q.shape
    num_pages, num_kv_heads, _, _ = k_pages.shape
    group = num_heads // num_kv_heads
    padded_group = triton.next_power_of_2(group)
    topk = block_ids.shape[2]
    inverse = invert(block_ids, batch, num_pages=num_pages, item_tokens=CONFIG["item_tokens"])
    partial = q.new_empty(inverse.entries.shape[0], group, dim)
    lse = torch.empty(inverse.entries.shape[0], group, dtype=torch.float32, device=q.device)
    _attend_kernel[(inverse.items.shape[0],)](
        q,
        k_pages,
        v_pages,
        partial,
        lse,
        inverse.entries,
        inverse.items,
        inverse.cursors,
        q.stride(0),
        q.stride(1),
        k_pages.stride(0),
        k_pages.stride(1),
        k_pages.stride(2),
        v_pages.stride(0),
        v_pages.stride(1),
        v_pages.stride(2),
        num_pages,
        num_kv_heads,
        scale * k_scale * math.log2(math.e),
        v_scale,
        GROUP=group,
        PADDED_GROUP=padded_group,
        DIM=dim,
        BLOCK=BLOCK_SIZE,
        TOKENS=max(1, CONFIG["rows"] // padded_group),
        num_warps=CONFIG["num_warps"],
        num_stages=CONFIG["num_stages"],
    )
    _combine_kernel[(num_tokens, num_kv_heads)](
        partial,
        lse,
        inverse.place,
        out,
        out.stride(0),
        out.stride(1),
        num_tokens,
        GROUP=group,
        PADDED_GROUP=padded_group,
        DIM=dim,
        TOPK=topk,
        SLOTS=triton.next_power_of_2(topk),
        num_warps=4,
    )


@triton.jit
def _attend_kernel(
    q,
    k_pages,
    v_pages,
    partial,
    lse,
    entries,
    items,
    cursors,
    q_token_stride,
    q_head_stride,
    k_page_stride,
    k_head_stride,
    k_token_stride,
    v_page_stride,
    v_head_stride,
    v_token_stride,
    num_pages,
    num_kv_heads,
    scale,
    v_scale,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    item = tl.program_id(0)
    if item >= tl.load(cursors + 1):
        return
    key = tl.load(items + item * 3)
    start = tl.load(items + item * 3 + 1)
    count = tl.load(items + item * 3 + 2)
    partly = key >= num_kv_heads * num_pages
    key = key % (num_kv_heads * num_pages)
    head = (key // num_pages).to(tl.int64)
    page = (key % num_pages).to(tl.int64)

    stacked = tl.arange(0, TOKENS * PADDED_GROUP)
    in_tile = stacked // PADDED_GROUP
    in_group = stacked % PADDED_GROUP
    channel = tl.arange(0, DIM)
    slot = tl.arange(0, BLOCK)
    q_heads = q + (head * GROUP + in_group[:, None]) * q_head_stride + channel[None, :]
    k_block = k_pages + page * k_page_stride + head * k_head_stride + slot[:, None] * k_token_stride + channel[None, :]
    v_block = v_pages + page * v_page_stride + head * v_head_stride + slot[:, None] * v_token_stride + channel[None, :]
    if partly:
        for i in range(0, count, TOKENS):
            live = (i + in_tile < count) & (in_group < GROUP)
            entry = start + i + in_tile
            packed = tl.load(entries + entry, mask=live, other=0)
            visible = (packed >> _TOKEN_BITS) + 1
            token = (packed & _TOKEN_MASK).to(tl.int64)
            # Beyond what any query of the tile sees lies garbage; 0 * NaN would reach the sum.
            used = slot[:, None] < tl.max(tl.where(live, visible, 0))
            k = tl.load(k_block, mask=used, other=0.0).to(q.dtype.element_ty)
            v = tl.load(v_block, mask=used, other=0.0).to(q.dtype.element_ty)
            tile = tl.load(q_heads + token[:, None] * q_token_stride, mask=live[:, None], other=0.0)
            logits = tl.dot(tile, tl.trans(k), input_precision="ieee") * scale
            logits = tl.where(slot[None, :] < visible[:, None], logits, float("-inf"))
            _finish(logits, v, partial, lse, entry, in_group, channel, live, v_scale, GROUP, DIM)
    else:
        k = tl.load(k_block).to(q.dtype.element_ty)
        v = tl.load(v_block).to(q.dtype.element_ty)
        for i in range(0, count, TOKENS):
            live = (i + in_tile < count) & (in_group < GROUP)
            entry = start + i + in_tile
            token = (tl.load(entries + entry, mask=live, other=0) & _TOKEN_MASK).to(tl.int64)
            tile = tl.load(q_heads + token[:, None] * q_token_stride, mask=live[:, None], other=0.0)
            logits = tl.dot(tile, tl.trans(k), input_precision="ieee") * scale
            _finish(logits, v, partial, lse, entry, in_group, channel, live, v_scale, GROUP, DIM)


@triton.jit
def _finish(
    logits, v, partial, lse, entry, in_group, channel, live, v_scale, GROUP: tl.constexpr, DIM: tl.constexpr
):
    """Softmax over one block, its product with V, and both stored."""
    largest = tl.max(logits, axis=1)
    weights = tl.exp2(logits - largest[:, None])
    total = tl.sum(weights, axis=1)
    result = tl.dot(weights.to(v.dtype), v, input_precision="ieee") * (v_scale / total)[:, None]
    at = entry.to(tl.int64) * GROUP + in_group
    tl.store(lse + at, largest + tl.log2(total), mask=live)
    tl.store(
        partial + at[:, None] * DIM + channel[None, :], result.to(partial.dtype.element_ty), mask=live[:, None]
    )


@triton.jit
def _combine_kernel(
    partial,
    lse,
    place,
    out,
    out_token_stride,
    out_head_stride,
    num_tokens,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    DIM: tl.constexpr,
    TOPK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    in_group = tl.arange(0, PADDED_GROUP)
    channel = tl.arange(0, DIM)
    slot = tl.arange(0, SLOTS)
    places = place + (head * num_tokens + token) * TOPK
    entry = tl.load(places + slot, mask=slot < TOPK, other=-1).to(tl.int64)
    of_group = (in_group < GROUP)[None, :]
    logsumexp = tl.load(
        lse + entry[:, None] * GROUP + in_group[None, :], mask=(entry >= 0)[:, None] & of_group, other=float("-inf")
    )
    largest = tl.maximum(tl.max(logsumexp, axis=0), -1e30)  # -inf for no block at all: the output is then 0
    total = tl.sum(tl.exp2(logsumexp - largest[None, :]), axis=0)
    result = tl.zeros([PADDED_GROUP, DIM], dtype=tl.float32)
    for i in tl.static_range(TOPK):
        one = tl.load(places + i).to(tl.int64)
        there = in_group < tl.where(one >= 0, GROUP, 0)
        weight = tl.exp2(tl.load(lse + one * GROUP + in_group, mask=there, other=float("-inf")) - largest)
        value = tl.load(
            partial + (one * GROUP + in_group)[:, None] * DIM + channel[None, :], mask=there[:, None], other=0.0
        )
        result += weight[:, None] * value.to(tl.float32)
    result = result / tl.where(total > 0, total, 1.0)[:, None]
    at = out + token * out_token_stride + (head * GROUP + in_group)[:, None] * out_head_stride + channel[None, :]
    tl.store(at, result.to(out.dtype.element_ty), mask=(in_group < GROUP)[:, None])
