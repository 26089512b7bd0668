"""Attention of tokens far into their sequence, KV outer: load a block's K and V once, stream the queries that chose it.

Each (token, selected block) leaves a normalised partial output and its log-sum-exp, in the order of the lists, so that
a tile's partial outputs are one contiguous stretch. A second kernel gathers and combines those of a token.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..batch import BLOCK_SIZE, Batch
from . import arch, tma
from .fp8 import loadable, widen
from .invert import _ELSEWHERE, _TOKEN_BITS, _TOKEN_MASK, invert
from .rows import STEP_ARGUMENTS
from .sizes import next_power_of_2

TILE_ROWS = 64
"""Rows of a tile: tokens times query heads of the group. With 64 and four warps two programs fit on an SM, and one
loads or takes exponentials while the other multiplies."""
NUM_WARPS = 4
MIN_ITEM_TOKENS = 16
MAX_ITEM_TOKENS = 64
"""Most tokens that one program streams past its block, in a short and in a long step."""
ITEMS_PER_SM = 16
"""Work items that should be left for each SM: with fewer, some SMs are done long before the others."""
COMBINE_TOGETHER = 2
"""Partial outputs of a token that are loaded at a time: more were slower by far."""


def attend_far(
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
    near_blocks: int,
) -> None:
    """Write ``out`` of the tokens that see more than ``near_blocks`` blocks, and zeros for padding; no others.

    Shapes are those of :func:`msa_backend.kernels.api.sparse_attention`.
    """
    num_tokens, num_heads, dim = q.shape
    num_pages, num_kv_heads, _, _ = k_pages.shape
    group = num_heads // num_kv_heads
    padded_group = next_power_of_2(group)
    topk = block_ids.shape[2]
    tile_tokens = max(1, TILE_ROWS // padded_group)
    fair_share = block_ids.numel() // (ITEMS_PER_SM * arch.num_sms(q.device))
    item_tokens = MAX_ITEM_TOKENS
    while item_tokens > max(MIN_ITEM_TOKENS, fair_share):
        item_tokens //= 2
    item_tokens = max(item_tokens, tile_tokens)
    k_pages, v_pages = loadable(k_pages), loadable(v_pages)
    inverse = invert(
        block_ids,
        batch,
        num_pages=num_pages,
        item_tokens=item_tokens,
        tile_tokens=tile_tokens,
        near_blocks=near_blocks,
    )
    partial = q.new_empty(inverse.entries.shape[0] * padded_group, dim)
    lse = torch.empty(partial.shape[0], dtype=torch.float32, device=q.device)
    keys, values = (tma.descriptor(x, [1, 1, BLOCK_SIZE, dim]) for x in (k_pages, v_pages))
    partial_tiles = tma.descriptor(partial, [tile_tokens * padded_group, dim])
    for partly in (False, True):
        load_tma = not partly and keys is not None and values is not None
        _attend_kernel[(inverse.items.shape[1],)](
            q,
            keys if load_tma else k_pages,
            values if load_tma else v_pages,
            partial if partial_tiles is None else partial_tiles,
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
            ITEM_TOKENS=item_tokens,
            PARTLY=partly,
            LOAD_TMA=load_tma,
            STORE_TMA=partial_tiles is not None,
            num_warps=NUM_WARPS,
            num_stages=1,
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
        SLOTS=next_power_of_2(max(topk, COMBINE_TOGETHER)),
        TOGETHER=COMBINE_TOGETHER,
        num_warps=4,
    )


@triton.jit(do_not_specialize=STEP_ARGUMENTS)
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
    LOAD_TMA: tl.constexpr,
    STORE_TMA: tl.constexpr,
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
    # The first queries set out before the block does: waiting for both at once is shorter.
    entry = start + in_tile
    real = (in_group < GROUP)[:, None]
    packed = tl.load(entries + entry, mask=in_tile < count, other=0)
    tile = tl.load(q_heads + (packed & _TOKEN_MASK).to(tl.int64)[:, None] * q_token_stride, mask=real, other=0.0)
    next_packed = tl.load(entries + entry + TOKENS, mask=in_tile + TOKENS < count, other=0)
    if PARTLY:
        # Beyond what any query of the item sees lies garbage; 0 * NaN would reach the sum.
        of_item = tl.arange(0, ITEM_TOKENS)
        used = (tl.load(entries + start + of_item, mask=of_item < count, other=0) >> _TOKEN_BITS) + 1
        valid = slot < tl.max(tl.where(of_item < count, used, 0))
    if LOAD_TMA:
        k = widen(k_pages.load([page, head, 0, 0]).reshape(BLOCK, DIM), q.dtype.element_ty)
        v = widen(v_pages.load([page, head, 0, 0]).reshape(BLOCK, DIM), q.dtype.element_ty)
    else:
        head = head.to(tl.int64)
        page = page.to(tl.int64)
        k_block = k_pages + page * k_page_stride + head * k_head_stride
        k_block += slot[:, None] * k_token_stride + channel[None, :]
        v_block = v_pages + page * v_page_stride + head * v_head_stride
        v_block += slot[:, None] * v_token_stride + channel[None, :]
        if PARTLY:
            k = widen(tl.load(k_block, mask=valid[:, None], other=0.0), q.dtype.element_ty)
            v = widen(tl.load(v_block, mask=valid[:, None], other=0.0), q.dtype.element_ty)
        else:
            k = widen(tl.load(k_block), q.dtype.element_ty)
            v = widen(tl.load(v_block), q.dtype.element_ty)
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
        if STORE_TMA:
            partial.store([(start + i) * PADDED_GROUP, 0], result)
        else:
            tl.store(partial + at[:, None] * DIM + channel[None, :], result)
        tile = next_tile
        packed = next_packed
        next_packed = after_next
        entry += TOKENS


@triton.jit(do_not_specialize=STEP_ARGUMENTS)
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
    # A branch at the top that leaves these tokens out would make every load below wait for it.
    mine = tl.load(places) != _ELSEWHERE
    tl.store(at, result.to(out.dtype.element_ty), mask=(in_group < tl.where(mine, GROUP, 0))[:, None])
