"""From the fused projection to attention's inputs, in one launch: norm, rotate, write the cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..batch import BLOCK_SIZE
from .fp8 import storable, to_cache

QUERY_HEADS_PER_PROGRAM = 16


def norm_rope_write(
    projected: Tensor,
    positions: Tensor,
    cos_sin_cache: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    index_q_weight: Tensor,
    index_k_weight: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    index_k_pages: Tensor,
    slot_mapping: Tensor,
    *,
    num_heads: int,
    eps: float,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    index_q_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`msa_backend.kernels.api.norm_rope_write`."""
    num_tokens = projected.shape[0]
    num_kv_heads, head_dim, index_dim = k_pages.shape[1], k_pages.shape[3], index_k_pages.shape[2]
    max_positions, rotary_dim = cos_sin_cache.shape
    q = projected.new_empty(num_tokens, num_heads, head_dim)
    index_q = projected.new_empty(num_tokens, num_kv_heads, index_dim, dtype=index_q_dtype or projected.dtype)
    if num_tokens == 0:
        return q, index_q
    k_pages, kv_mantissa = storable(k_pages)
    v_pages, _ = storable(v_pages)
    index_k_pages, index_k_mantissa = storable(index_k_pages)
    index_q_out, index_q_mantissa = storable(index_q)
    q_rows = min(QUERY_HEADS_PER_PROGRAM, triton.next_power_of_2(num_heads))
    q_programs = triton.cdiv(num_heads, q_rows)
    _norm_rope_write[(num_tokens, q_programs + 4)](
        projected, positions, cos_sin_cache, q_weight, k_weight, index_q_weight, index_k_weight,
        q, index_q_out, k_pages, v_pages, index_k_pages, slot_mapping, eps, k_scale, v_scale,
        max_positions, projected.stride(0), cos_sin_cache.stride(0),
        *k_pages.stride()[:3], *v_pages.stride()[:3], *index_k_pages.stride()[:2],
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, INDEX_DIM=index_dim,
        HALF=rotary_dim // 2, HALF_PADDED=triton.next_power_of_2(rotary_dim // 2),
        HEAD_REST=triton.next_power_of_2(head_dim - rotary_dim) if head_dim > rotary_dim else 1,
        INDEX_REST=triton.next_power_of_2(index_dim - rotary_dim) if index_dim > rotary_dim else 1,
        Q_ROWS=q_rows, Q_PROGRAMS=q_programs, KV_ROWS=triton.next_power_of_2(num_kv_heads), BLOCK_SIZE=BLOCK_SIZE,
        KV_MANTISSA=kv_mantissa, INDEX_K_MANTISSA=index_k_mantissa, INDEX_Q_MANTISSA=index_q_mantissa,
    )  # fmt: skip
    return q, index_q


@triton.jit
def _norm_rope_write(
    projected_ptr, positions_ptr, cos_sin_ptr, q_weight_ptr, k_weight_ptr, index_q_weight_ptr, index_k_weight_ptr,
    q_ptr, index_q_ptr, k_pages_ptr, v_pages_ptr, index_k_pages_ptr, slots_ptr, eps, k_scale, v_scale,
    max_positions, projected_token, cos_sin_position,
    k_page, k_page_head, k_page_token, v_page, v_page_head, v_page_token, index_page, index_page_token,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, INDEX_DIM: tl.constexpr,
    HALF: tl.constexpr, HALF_PADDED: tl.constexpr, HEAD_REST: tl.constexpr, INDEX_REST: tl.constexpr,
    Q_ROWS: tl.constexpr, Q_PROGRAMS: tl.constexpr, KV_ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    KV_MANTISSA: tl.constexpr, INDEX_K_MANTISSA: tl.constexpr, INDEX_Q_MANTISSA: tl.constexpr,
):  # fmt: skip
    """Grid (token, part): the parts are some query heads each, then all index queries, keys, values, the index key."""
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    k_start: tl.constexpr = NUM_HEADS * HEAD_DIM
    v_start: tl.constexpr = k_start + NUM_KV_HEADS * HEAD_DIM
    index_q_start: tl.constexpr = v_start + NUM_KV_HEADS * HEAD_DIM
    index_k_start: tl.constexpr = index_q_start + NUM_KV_HEADS * INDEX_DIM
    projected_ptr += token * projected_token

    # A padding token's position may be anything.
    position = tl.load(positions_ptr + token).to(tl.int64)
    position = tl.minimum(tl.maximum(position, 0), max_positions - 1)
    cos_sin_ptr += position * cos_sin_position
    kv_row = tl.arange(0, KV_ROWS)

    if part < Q_PROGRAMS:
        row = part * Q_ROWS + tl.arange(0, Q_ROWS)
        first, second, rest = _norm_rope(
            projected_ptr, row, NUM_HEADS, q_weight_ptr, cos_sin_ptr, eps, HEAD_DIM, HALF, HALF_PADDED, HEAD_REST
        )
        q_ptr += token * (NUM_HEADS * HEAD_DIM)
        _store(q_ptr, HEAD_DIM, row, NUM_HEADS, first, second, rest, HEAD_DIM, HALF, HALF_PADDED, HEAD_REST)
        return
    if part == Q_PROGRAMS:
        first, second, rest = _norm_rope(
            projected_ptr + index_q_start, kv_row, NUM_KV_HEADS, index_q_weight_ptr, cos_sin_ptr, eps,
            INDEX_DIM, HALF, HALF_PADDED, INDEX_REST,
        )  # fmt: skip
        if INDEX_Q_MANTISSA > 0:
            # The order of a query's block scores is the same under any positive factor: use e4m3's whole range.
            largest = tl.maximum(tl.max(tl.abs(first), 1), tl.max(tl.abs(second), 1))
            largest = tl.maximum(largest, tl.max(tl.abs(rest), 1))
            factor = tl.where(largest > 0, 448.0 / largest, 1.0)[:, None]
            first = to_cache(first * factor, 1.0, INDEX_Q_MANTISSA)
            second = to_cache(second * factor, 1.0, INDEX_Q_MANTISSA)
            rest = to_cache(rest * factor, 1.0, INDEX_Q_MANTISSA)
        index_q_ptr += token * (NUM_KV_HEADS * INDEX_DIM)
        _store(
            index_q_ptr, INDEX_DIM, kv_row, NUM_KV_HEADS, first, second, rest, INDEX_DIM, HALF, HALF_PADDED, INDEX_REST
        )
        return

    slot = tl.load(slots_ptr + token)
    if slot < 0:
        return
    page, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    if part == Q_PROGRAMS + 1:
        first, second, rest = _norm_rope(
            projected_ptr + k_start, kv_row, NUM_KV_HEADS, k_weight_ptr, cos_sin_ptr, eps,
            HEAD_DIM, HALF, HALF_PADDED, HEAD_REST,
        )  # fmt: skip
        first, second = to_cache(first, k_scale, KV_MANTISSA), to_cache(second, k_scale, KV_MANTISSA)
        rest = to_cache(rest, k_scale, KV_MANTISSA)
        k_pages_ptr += page * k_page + offset * k_page_token
        _store(
            k_pages_ptr, k_page_head, kv_row, NUM_KV_HEADS, first, second, rest, HEAD_DIM, HALF, HALF_PADDED, HEAD_REST
        )
    elif part == Q_PROGRAMS + 2:
        head, dim = kv_row[:, None], tl.arange(0, HEAD_DIM)[None, :]
        live = head < NUM_KV_HEADS
        v = tl.load(projected_ptr + v_start + head * HEAD_DIM + dim, mask=live)
        v_pages_ptr += page * v_page + offset * v_page_token
        tl.store(v_pages_ptr + head * v_page_head + dim, to_cache(v, v_scale, KV_MANTISSA), mask=live)
    else:
        row = tl.arange(0, 1)
        first, second, rest = _norm_rope(
            projected_ptr + index_k_start, row, 1, index_k_weight_ptr, cos_sin_ptr, eps,
            INDEX_DIM, HALF, HALF_PADDED, INDEX_REST,
        )  # fmt: skip
        first, second = to_cache(first, 1.0, INDEX_K_MANTISSA), to_cache(second, 1.0, INDEX_K_MANTISSA)
        rest = to_cache(rest, 1.0, INDEX_K_MANTISSA)
        index_k_pages_ptr += page * index_page + offset * index_page_token
        _store(index_k_pages_ptr, INDEX_DIM, row, 1, first, second, rest, INDEX_DIM, HALF, HALF_PADDED, INDEX_REST)


@triton.jit
def _norm_rope(
    x_ptr, row, num_rows, weight_ptr, cos_sin_ptr, eps,
    DIM: tl.constexpr, HALF: tl.constexpr, HALF_PADDED: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Norm and rotate the heads ``row`` of one token, in fp32.

    A head is read as three pieces, so that each channel is loaded once: the two halves of the channels that rope
    pairs, and the rest. Pieces are padded to powers of two; padding is 0.
    """
    half, rest = tl.arange(0, HALF_PADDED)[None, :], 2 * HALF + tl.arange(0, REST)[None, :]
    in_half, in_rest, live = half < HALF, rest < DIM, row[:, None] < num_rows
    x_ptr += row[:, None] * DIM
    x1 = tl.load(x_ptr + half, mask=live & in_half, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + HALF + half, mask=live & in_half, other=0.0).to(tl.float32)
    x3 = tl.load(x_ptr + rest, mask=live & in_rest, other=0.0).to(tl.float32)
    w1 = tl.load(weight_ptr + half, mask=in_half, other=0.0).to(tl.float32) + 1.0
    w2 = tl.load(weight_ptr + HALF + half, mask=in_half, other=0.0).to(tl.float32) + 1.0
    w3 = tl.load(weight_ptr + rest, mask=in_rest, other=0.0).to(tl.float32) + 1.0
    cos = tl.load(cos_sin_ptr + half, mask=in_half, other=0.0).to(tl.float32)
    sin = tl.load(cos_sin_ptr + HALF + half, mask=in_half, other=0.0).to(tl.float32)

    mean_square = (tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1) + tl.sum(x3 * x3, 1)) / DIM
    norm = tl.rsqrt(mean_square + eps)[:, None]
    x1, x2, x3 = x1 * norm * w1, x2 * norm * w2, x3 * norm * w3
    return x1 * cos - x2 * sin, x2 * cos + x1 * sin, x3


@triton.jit
def _store(
    out_ptr, out_row, row, num_rows, first, second, third,
    DIM: tl.constexpr, HALF: tl.constexpr, HALF_PADDED: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Put the three pieces of the heads ``row`` together again, in the dtype of ``out_ptr``."""
    half, rest = tl.arange(0, HALF_PADDED)[None, :], 2 * HALF + tl.arange(0, REST)[None, :]
    in_half, in_rest, live = half < HALF, rest < DIM, row[:, None] < num_rows
    out_ptr += row[:, None] * out_row
    tl.store(out_ptr + half, first, mask=live & in_half)
    tl.store(out_ptr + HALF + half, second, mask=live & in_half)
    tl.store(out_ptr + rest, third, mask=live & in_rest)
