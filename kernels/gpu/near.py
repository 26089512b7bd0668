"""Attention of tokens near the start of their sequence, queries outer.

A token with up to ``NEAR_BLOCKS`` visible blocks selects most of them. There it is cheaper to walk over all of them
once, as dense attention does, with one bit a block to say which the token selected, than to write and combine a partial
output for each.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from ..batch import BLOCK_SIZE, Batch
from . import tma
from .fp8 import loadable, widen
from .rows import STEP_ARGUMENTS, live_page
from .sizes import ceil_div, next_power_of_2

NEAR_BLOCKS = 24
"""Visible blocks up to which this kernel attends; at most 32, the bits of a word."""
TILE_ROWS = 64
"""Rows of a tile: tokens times query heads of the group."""
TILE_KEYS = 32
"""Keys of a block that are worked on at a time. Small tiles let several programs share an SM, and one loads or takes
exponentials while another multiplies; measured against 64 and 128, and against tiles of 128 rows."""
NUM_WARPS = 4
NUM_STAGES = 3


def near_blocks(topk: int) -> int:
    """Tokens that see up to so many blocks belong to this kernel. With a small top-k most of the walk is in vain."""
    return min(NEAR_BLOCKS, topk * 3 // 2)


def attend_near(
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
    """Write ``out`` of the tokens that see at most ``near_blocks(topk)`` blocks, and zeros for padding; no others.

    Shapes are those of :func:`msa_backend.kernels.api.sparse_attention`.
    """
    num_tokens, num_heads, dim = q.shape
    _, num_kv_heads, _, _ = k_pages.shape
    topk = block_ids.shape[2]
    group = num_heads // num_kv_heads
    padded_group = next_power_of_2(group)
    tile_tokens = max(1, TILE_ROWS // padded_group)
    k_pages, v_pages = loadable(k_pages), loadable(v_pages)
    keys, values = (tma.descriptor(x, [1, 1, TILE_KEYS, dim]) for x in (k_pages, v_pages))
    use_tma = keys is not None and values is not None
    longest = min(batch.max_query_len, near_blocks(topk) * BLOCK_SIZE)
    _near_kernel[(ceil_div(longest, tile_tokens), num_kv_heads, batch.num_seqs + 1)](
        q,
        keys if use_tma else k_pages,
        values if use_tma else v_pages,
        k_pages,
        v_pages,
        block_ids,
        out,
        batch.cu_seqlens_q,
        batch.context_lens,
        batch.seq_lens,
        batch.block_table,
        q.stride(0),
        q.stride(1),
        k_pages.stride(0),
        k_pages.stride(1),
        k_pages.stride(2),
        v_pages.stride(0),
        v_pages.stride(1),
        v_pages.stride(2),
        block_ids.stride(0),
        block_ids.stride(1),
        block_ids.stride(2),
        out.stride(0),
        out.stride(1),
        batch.block_table.stride(0),
        num_tokens,
        batch.num_seqs,
        k_pages.shape[0],
        scale * k_scale * math.log2(math.e),
        v_scale,
        min(near_blocks(topk), batch.block_table.shape[1]),
        GROUP=group,
        PADDED_GROUP=padded_group,
        DIM=dim,
        BLOCK=BLOCK_SIZE,
        KEYS=TILE_KEYS,
        TOKENS=tile_tokens,
        TOPK=topk,
        SLOTS=next_power_of_2(topk),
        TMA=use_tma,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )


@triton.jit(do_not_specialize=STEP_ARGUMENTS)
def _near_kernel(
    q,
    k_tiles,
    v_tiles,
    k_pages,
    v_pages,
    block_ids,
    out,
    cu_seqlens_q,
    context_lens,
    seq_lens,
    block_table,
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
    ids_slot_stride,
    out_token_stride,
    out_head_stride,
    table_stride,
    num_tokens,
    num_seqs,
    num_pages,
    scale,
    v_scale,
    near_blocks,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    TOKENS: tl.constexpr,
    TOPK: tl.constexpr,
    SLOTS: tl.constexpr,
    TMA: tl.constexpr,
):
    head = tl.program_id(1)
    row = tl.program_id(2)
    stacked = tl.arange(0, TOKENS * PADDED_GROUP)
    in_group = stacked % PADDED_GROUP
    in_tile = stacked // PADDED_GROUP
    channel = tl.arange(0, DIM)
    start = tl.load(cu_seqlens_q + row)
    out_rows = out + (head * GROUP + in_group)[:, None] * out_head_stride + channel[None, :]
    end = num_tokens
    padding = row == num_seqs  # one row more than there are: the tokens past the last
    if row < num_seqs:
        end = tl.load(cu_seqlens_q + row + 1)
        padding = tl.load(seq_lens + row) == 0
    if padding:
        for first in range(start + tl.program_id(0) * TOKENS, end, tl.num_programs(0) * TOKENS):
            token = first + in_tile
            live = (token < end) & (in_group < GROUP)
            nothing = tl.zeros([TOKENS * PADDED_GROUP, DIM], dtype=out.dtype.element_ty)
            tl.store(out_rows + token.to(tl.int64)[:, None] * out_token_stride, nothing, mask=live[:, None])
        return

    tile = tl.minimum(tl.cdiv(end - start, TOKENS), tl.num_programs(0)) - 1 - tl.program_id(0)  # the longest first
    context_len = tl.load(context_lens + row)
    first_position = context_len + tile * TOKENS
    if tile < 0 or first_position >= near_blocks * BLOCK:
        return
    position = first_position + in_tile
    token = (start + tile * TOKENS + in_tile).to(tl.int64)
    near_end = tl.minimum(context_len + end - start, near_blocks * BLOCK)
    live = (position < near_end) & (in_group < GROUP)
    tile_q = tl.load(
        q + token[:, None] * q_token_stride + (head * GROUP + in_group)[:, None] * q_head_stride + channel[None, :],
        mask=live[:, None],
        other=0.0,
    )
    slot = tl.arange(0, SLOTS)
    ids = tl.load(
        block_ids + head * ids_head_stride + token[:, None] * ids_token_stride + slot[None, :] * ids_slot_stride,
        mask=live[:, None] & (slot < TOPK)[None, :],
        other=-1,
    )
    chosen = tl.sum(tl.where(ids >= 0, 1 << tl.maximum(ids, 0), 0), axis=1)

    largest = tl.full([TOKENS * PADDED_GROUP], -1e30, dtype=tl.float32)
    total = tl.zeros([TOKENS * PADDED_GROUP], dtype=tl.float32)
    result = tl.zeros([TOKENS * PADDED_GROUP, DIM], dtype=tl.float32)
    key = tl.arange(0, KEYS)
    table = block_table + row.to(tl.int64) * table_stride
    k_head = k_pages + head.to(tl.int64) * k_head_stride
    v_head = v_pages + head.to(tl.int64) * v_head_stride
    seen_by_all = first_position // BLOCK
    PARTS: tl.constexpr = BLOCK // KEYS
    for part in range(seen_by_all * PARTS):
        block = part // PARTS
        first_key = part % PARTS * KEYS
        page = live_page(table + block, num_pages)
        if TMA:
            k = widen(k_tiles.load([page, head, first_key, 0]).reshape(KEYS, DIM), q.dtype.element_ty)
            v = widen(v_tiles.load([page, head, first_key, 0]).reshape(KEYS, DIM), q.dtype.element_ty)
        else:
            k_block = k_head + page.to(tl.int64) * k_page_stride + first_key * k_token_stride
            v_block = v_head + page.to(tl.int64) * v_page_stride + first_key * v_token_stride
            k = widen(tl.load(k_block + key[:, None] * k_token_stride + channel[None, :]), q.dtype.element_ty)
            v = widen(tl.load(v_block + key[:, None] * v_token_stride + channel[None, :]), q.dtype.element_ty)
        dots = tl.dot(tile_q, tl.trans(k), input_precision="ieee")
        # Rows that did not select the block: exp2(-inf) is 0, and only a vector is masked.
        selected = (chosen >> block) & 1 == 1
        new_largest = tl.where(selected, tl.maximum(largest, tl.max(dots, axis=1) * scale), largest)
        weights = tl.exp2(dots * scale - tl.where(selected, new_largest, float("inf"))[:, None])
        kept = tl.exp2(largest - new_largest)
        total = total * kept + tl.sum(weights, axis=1)
        result = result * kept[:, None]
        result = tl.dot(weights.to(q.dtype.element_ty), v, result, input_precision="ieee")
        largest = new_largest
    last_position = tl.minimum(first_position + TOKENS, near_end) - 1
    for part in range(seen_by_all * PARTS, last_position // KEYS + 1):
        block = part // PARTS
        page = live_page(table + block, num_pages).to(tl.int64)
        key_position = part * KEYS + key
        # Past the last query's position may lie garbage; 0 * NaN would reach the sum.
        valid = (key_position <= last_position)[:, None]
        in_block = (part % PARTS * KEYS + key)[:, None]
        k_block = k_head + page * k_page_stride + in_block * k_token_stride + channel[None, :]
        v_block = v_head + page * v_page_stride + in_block * v_token_stride + channel[None, :]
        k = widen(tl.load(k_block, mask=valid, other=0.0), q.dtype.element_ty)
        v = widen(tl.load(v_block, mask=valid, other=0.0), q.dtype.element_ty)
        dots = tl.dot(tile_q, tl.trans(k), input_precision="ieee") * scale
        visible = (key_position[None, :] <= position[:, None]) & ((chosen >> block) & 1 == 1)[:, None]
        dots = tl.where(visible, dots, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(dots, axis=1))
        weights = tl.exp2(dots - new_largest[:, None])
        kept = tl.exp2(largest - new_largest)
        total = total * kept + tl.sum(weights, axis=1)
        result = result * kept[:, None]
        result = tl.dot(weights.to(q.dtype.element_ty), v, result, input_precision="ieee")
        largest = new_largest
    result = result * (v_scale / tl.where(total > 0, total, 1.0))[:, None]
    tl.store(out_rows + token[:, None] * out_token_stride, result.to(out.dtype.element_ty), mask=live[:, None])
