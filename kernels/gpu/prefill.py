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

CONFIG = {"rows": 64, "num_warps": 4, "num_stages": 1, "item_tokens": 64, "maxnreg": None, "tma_store": True, "tma": True}
COMBINE_TOGETHER = 2
"""Partial outputs of a token that are loaded at a time."""


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
    tile_tokens = max(1, CONFIG["rows"] // padded_group)
    inverse = invert(
        block_ids, batch, num_pages=num_pages, item_tokens=CONFIG["item_tokens"], tile_tokens=tile_tokens
    )
    partial = q.new_empty(inverse.entries.shape[0], padded_group, dim)
    lse = torch.empty(inverse.entries.shape[0], padded_group, dtype=torch.float32, device=q.device)
    partial_desc = partial
    if CONFIG["tma_store"]:
        from triton.tools.tensor_descriptor import TensorDescriptor
        flat = partial.view(-1, dim)
        partial_desc = TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [tile_tokens * padded_group, dim])
    for partly in (False, True):
        use_tma = CONFIG["tma"] and not partly
        if use_tma:
            from triton.tools.tensor_descriptor import TensorDescriptor
            k_desc, v_desc = (
                TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, BLOCK_SIZE, dim]) for x in (k_pages, v_pages)
            )
        else:
            k_desc, v_desc = k_pages, v_pages
        _attend_kernel[(inverse.items.shape[1],)](
            q,
            k_desc,
            v_desc,
            partial_desc,
            lse,
            inverse.entries,
            inverse.items[int(partly)],
            inverse.num_items[int(partly) :],
            q.stride(0),
            q.stride(1),
            k_pages.stride(0),
            k_pages.stride(1),
            k_pages.stride(2),
            v_pages.stride(0),
            v_pages.stride(1),
            v_pages.stride(2),
            num_pages,
            scale * k_scale * math.log2(math.e),
            v_scale,
            GROUP=group,
            PADDED_GROUP=padded_group,
            DIM=dim,
            BLOCK=BLOCK_SIZE,
            TOKENS=tile_tokens,
            ITEM_TOKENS=CONFIG["item_tokens"],
            PARTLY=partly,
            TMA=use_tma,
            TMA_STORE=CONFIG["tma_store"],
            num_warps=CONFIG["num_warps"],
            num_stages=1 if partly else CONFIG["num_stages"],
            maxnreg=None if partly else CONFIG["maxnreg"],
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
        SLOTS=triton.next_power_of_2(max(topk, COMBINE_TOGETHER)),
        TOGETHER=COMBINE_TOGETHER,
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
    num_items,
    q_token_stride,
    q_head_stride,
    k_page_stride,
    k_head_stride,
    k_token_stride,
    v_page_stride,
    v_head_stride,
    v_token_stride,
    num_pages,
    scale,
    v_scale,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    ITEM_TOKENS: tl.constexpr,
    PARTLY: tl.constexpr,
    TMA: tl.constexpr,
    TMA_STORE: tl.constexpr,
):
    item = tl.program_id(0)
    if item >= tl.load(num_items):
        return
    key = tl.load(items + item * 3)
    start = tl.load(items + item * 3 + 1)
    count = tl.load(items + item * 3 + 2)
    head = key // num_pages
    page = key % num_pages

    stacked = tl.arange(0, TOKENS * PADDED_GROUP)
    in_tile = stacked // PADDED_GROUP
    in_group = stacked % PADDED_GROUP
    channel = tl.arange(0, DIM)
    slot = tl.arange(0, BLOCK)
    q_heads = q + (head * GROUP + in_group[:, None]) * q_head_stride + channel[None, :]
    if PARTLY:
        # Beyond what any query of the item sees lies garbage; 0 * NaN would reach the sum.
        of_item = tl.arange(0, ITEM_TOKENS)
        used = (tl.load(entries + start + of_item, mask=of_item < count, other=0) >> _TOKEN_BITS) + 1
        valid = slot < tl.max(tl.where(of_item < count, used, 0))
    if TMA:
        k = k_pages.load([page, head, 0, 0]).reshape(BLOCK, DIM).to(q.dtype.element_ty)
        v = v_pages.load([page, head, 0, 0]).reshape(BLOCK, DIM).to(q.dtype.element_ty)
    else:
        head = head.to(tl.int64)
        page = page.to(tl.int64)
        k_block = k_pages + page * k_page_stride + head * k_head_stride + slot[:, None] * k_token_stride + channel[None, :]
        v_block = v_pages + page * v_page_stride + head * v_head_stride + slot[:, None] * v_token_stride + channel[None, :]
        if PARTLY:
            k = tl.load(k_block, mask=valid[:, None], other=0.0).to(q.dtype.element_ty)
            v = tl.load(v_block, mask=valid[:, None], other=0.0).to(q.dtype.element_ty)
        else:
            k = tl.load(k_block).to(q.dtype.element_ty)
            v = tl.load(v_block).to(q.dtype.element_ty)
    entry = start + in_tile
    real = (in_group < GROUP)[:, None]
    packed = tl.load(entries + entry, mask=in_tile < count, other=0)
    tile = tl.load(q_heads + (packed & _TOKEN_MASK).to(tl.int64)[:, None] * q_token_stride, mask=real, other=0.0)
    next_packed = tl.load(entries + entry + TOKENS, mask=in_tile + TOKENS < count, other=0)
    for i in range(0, count, TOKENS):
        # The next tile of queries is on its way while this one is worked on, and the next one's tokens before it.
        next_token = (next_packed & _TOKEN_MASK).to(tl.int64)
        next_tile = tl.load(q_heads + next_token[:, None] * q_token_stride, mask=real, other=0.0)
        after_next = tl.load(entries + entry + 2 * TOKENS, mask=i + 2 * TOKENS + in_tile < count, other=0)
        dots = tl.dot(tile, tl.trans(k), input_precision="ieee")
        if PARTLY:
            dots = tl.where(slot[None, :] <= (packed >> _TOKEN_BITS)[:, None], dots, float("-inf"))
        largest = tl.max(dots, axis=1) * scale
        weights = tl.exp2(dots * scale - largest[:, None])
        total = tl.sum(weights, axis=1)
        result = tl.dot(weights.to(v.dtype), v, input_precision="ieee") * (v_scale / total)[:, None]
        at = entry.to(tl.int64) * PADDED_GROUP + in_group
        tl.store(lse + at, largest + tl.log2(total))
        result = result.to(q.dtype.element_ty)
        if TMA_STORE:
            partial.store([(start + i) * PADDED_GROUP, 0], result)
        else:
            tl.store(partial + at[:, None] * DIM + channel[None, :], result)
        tile = next_tile
        packed = next_packed
        next_packed = after_next
        entry += TOKENS


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
    TOGETHER: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    in_group = tl.arange(0, PADDED_GROUP)
    channel = tl.arange(0, DIM)
    slot = tl.arange(0, SLOTS)
    places = place + (head * num_tokens + token) * TOPK
    entry = tl.load(places + slot, mask=slot < TOPK, other=-1).to(tl.int64)
    there = (entry >= 0)[:, None] & (in_group < GROUP)[None, :]
    logsumexp = tl.load(lse + entry[:, None] * PADDED_GROUP + in_group[None, :], mask=there, other=float("-inf"))
    largest = tl.maximum(tl.max(logsumexp, axis=0), -1e30)  # -inf for no block at all: the output is then 0
    total = tl.sum(tl.exp2(logsumexp - largest[None, :]), axis=0)
    result = tl.zeros([PADDED_GROUP, DIM], dtype=tl.float32)
    for i in tl.static_range(0, SLOTS, TOGETHER):
        slot = i + tl.arange(0, TOGETHER)
        entry = tl.load(places + slot, mask=slot < TOPK, other=-1).to(tl.int64)
        there = (entry >= 0)[:, None] & (in_group < GROUP)[None, :]
        at = entry[:, None] * PADDED_GROUP + in_group[None, :]
        weight = tl.exp2(tl.load(lse + at, mask=there, other=float("-inf")) - largest[None, :])
        value = tl.load(partial + at[:, :, None] * DIM + channel[None, None, :], mask=there[:, :, None], other=0.0)
        result += tl.sum(weight[:, :, None] * value.to(tl.float32), axis=0)
    result = result / tl.where(total > 0, total, 1.0)[:, None]
    at = out + token * out_token_stride + (head * GROUP + in_group)[:, None] * out_head_stride + channel[None, :]
    tl.store(at, result.to(out.dtype.element_ty), mask=(in_group < GROUP)[:, None])
