"""From the fused projection to attention's inputs, in one launch: norm, rotate, write the cache."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton import jit

from ..batch import BLOCK_SIZE
from ..caches import LayerCaches
from ..checks import query_heads
from ..norms import HeadNorms
from .fp8 import MANTISSA_BITS, storable, to_cache
from .launch import Launch, Options, kernel
from .pages import Pages, units
from .sizes import ceil_div, next_power_of_2
from .tiles import UNIT

ROWS = 16
"""Heads of one or more tokens that a program takes together."""
OPTIONS = Options(num_warps=4)


def norm_rope_write(
    projected: Tensor,
    positions: Tensor,
    norms: HeadNorms,
    caches: LayerCaches,
    slot_mapping: Tensor,
    *,
    index_q_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`msa_backend.kernels.api.norm_rope_write`."""
    num_tokens = projected.shape[0]
    key = norms, projected.shape[1], projected.dtype, index_q_dtype
    if key not in caches.kept:
        caches.kept[key] = _Form(projected, norms, caches, index_q_dtype or projected.dtype)
    form: _Form = caches.kept[key]
    q = projected.new_empty(num_tokens, form.num_heads, caches.head_dim)
    index_q = projected.new_empty(num_tokens, caches.num_kv_heads, caches.index_dim, dtype=form.index_q_dtype)
    if num_tokens:
        form.launch(projected, positions, slot_mapping, q, index_q)()
    return q, index_q


class _Form:
    """What is the same in all steps of a layer."""

    def __init__(self, projected: Tensor, norms: HeadNorms, caches: LayerCaches, index_q_dtype: torch.dtype) -> None:
        self.num_heads, self.index_q_dtype = query_heads(projected, caches), index_q_dtype
        num_kv_heads, head_dim, index_dim = caches.num_kv_heads, caches.head_dim, caches.index_dim
        assert caches.index_k_pages is not None
        (k_pages, kv_mantissa), (v_pages, _), (index_k_pages, index_k_mantissa) = (
            storable(pages) for pages in (caches.k_pages, caches.v_pages, caches.index_k_pages)
        )
        pages = caches.keep(Pages)
        self._norms = norms.cos_sin_cache, norms.q_weight, norms.k_weight, norms.index_q_weight, norms.index_k_weight
        self._pages = k_pages, v_pages, index_k_pages
        self._scalars = norms.eps, caches.k_scale, caches.v_scale
        self._strides = *pages.kv_strides, *pages.index_strides
        self._max_positions, rotary_dim = norms.cos_sin_cache.shape
        q_heads = min(ROWS, next_power_of_2(self.num_heads))
        kv_heads = next_power_of_2(num_kv_heads)
        self._q_tokens, self._kv_tokens = ROWS // q_heads, max(1, ROWS // kv_heads)
        self._q_parts = ceil_div(self.num_heads, q_heads)
        self._constants = (
            self.num_heads, num_kv_heads, head_dim, index_dim, rotary_dim // 2, next_power_of_2(rotary_dim // 2),
            next_power_of_2(head_dim - rotary_dim) if head_dim > rotary_dim else 1,
            next_power_of_2(index_dim - rotary_dim) if index_dim > rotary_dim else 1,
            norms.cos_sin_cache.stride(0), ROWS, q_heads, self._q_tokens, self._q_parts, kv_heads, self._kv_tokens,
            BLOCK_SIZE, kv_mantissa, index_k_mantissa, MANTISSA_BITS.get(index_q_dtype, 0),
        )  # fmt: skip

    def launch(self, projected: Tensor, positions: Tensor, slot_mapping: Tensor, q: Tensor, index_q: Tensor) -> Launch:
        num_tokens = projected.shape[0]
        programs = (
            ceil_div(num_tokens, self._q_tokens) * self._q_parts
            + 3 * ceil_div(num_tokens, self._kv_tokens)
            + ceil_div(num_tokens, ROWS)
        )
        return msa_norm_rope_write(
            (programs,),
            (
                projected, positions, *self._norms, q, storable(index_q)[0], *self._pages, slot_mapping,
                *self._scalars, num_tokens, self._max_positions, *units("projected", projected.stride()[:1]),
                *self._strides,
            ),
            self._constants,
            OPTIONS,
        )  # fmt: skip


@kernel(unaligned=("positions_ptr", "slots_ptr"))
def msa_norm_rope_write(
    projected_ptr, positions_ptr, cos_sin_ptr, q_weight_ptr, k_weight_ptr, index_q_weight_ptr, index_k_weight_ptr,
    q_ptr, index_q_ptr, k_pages_ptr, v_pages_ptr, index_k_pages_ptr, slots_ptr, eps, k_scale, v_scale,
    num_tokens, max_positions, projected_token,
    k_page, k_page_head, k_page_token, v_page, v_page_head, v_page_token, index_page, index_page_token,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, INDEX_DIM: tl.constexpr,
    HALF: tl.constexpr, HALF_PADDED: tl.constexpr, HEAD_REST: tl.constexpr, INDEX_REST: tl.constexpr,
    COS_SIN_STRIDE: tl.constexpr, ROWS: tl.constexpr,
    Q_HEADS: tl.constexpr, Q_TOKENS: tl.constexpr, Q_PARTS: tl.constexpr,
    KV_HEADS: tl.constexpr, KV_TOKENS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    KV_MANTISSA: tl.constexpr, INDEX_K_MANTISSA: tl.constexpr, INDEX_Q_MANTISSA: tl.constexpr,
):  # fmt: skip
    """The programs in order: query heads of some tokens, all index queries of some, keys, values, index keys."""
    k_start: tl.constexpr = NUM_HEADS * HEAD_DIM
    v_start: tl.constexpr = k_start + NUM_KV_HEADS * HEAD_DIM
    index_q_start: tl.constexpr = v_start + NUM_KV_HEADS * HEAD_DIM
    index_k_start: tl.constexpr = index_q_start + NUM_KV_HEADS * INDEX_DIM
    program = tl.program_id(0)
    projected_token *= UNIT
    q_programs = tl.cdiv(num_tokens, Q_TOKENS) * Q_PARTS
    kv_programs = tl.cdiv(num_tokens, KV_TOKENS)
    kv_head = tl.arange(0, KV_HEADS)[None, :, None]

    if program < q_programs:
        token = (program // Q_PARTS * Q_TOKENS + tl.arange(0, Q_TOKENS)).to(tl.int64)[:, None, None]
        head = (program % Q_PARTS) * Q_HEADS + tl.arange(0, Q_HEADS)[None, :, None]
        live = (token < num_tokens) & (head < NUM_HEADS)
        first, second, rest = _norm_rope(
            projected_ptr + token * projected_token + head * HEAD_DIM, live, q_weight_ptr,
            positions_ptr, cos_sin_ptr, token, num_tokens, max_positions, COS_SIN_STRIDE, eps,
            HEAD_DIM, HALF, HALF_PADDED, HEAD_REST,
        )  # fmt: skip
        out = q_ptr + token * (NUM_HEADS * HEAD_DIM) + head * HEAD_DIM
        _store(out, live, first, second, rest, HEAD_DIM, HALF, HALF_PADDED, HEAD_REST)
        return
    program -= q_programs
    if program < kv_programs:
        token = (program * KV_TOKENS + tl.arange(0, KV_TOKENS)).to(tl.int64)[:, None, None]
        live = (token < num_tokens) & (kv_head < NUM_KV_HEADS)
        first, second, rest = _norm_rope(
            projected_ptr + token * projected_token + index_q_start + kv_head * INDEX_DIM, live, index_q_weight_ptr,
            positions_ptr, cos_sin_ptr, token, num_tokens, max_positions, COS_SIN_STRIDE, eps,
            INDEX_DIM, HALF, HALF_PADDED, INDEX_REST,
        )  # fmt: skip
        if INDEX_Q_MANTISSA > 0:
            # The order of a query's block scores is the same under any positive factor: use e4m3's whole range.
            largest = tl.maximum(tl.max(tl.abs(first), 2), tl.max(tl.abs(second), 2))
            largest = tl.maximum(largest, tl.max(tl.abs(rest), 2))
            factor = tl.where(largest > 0, 448.0 / largest, 1.0)[:, :, None]
            first, second, rest = first * factor, second * factor, rest * factor
        out = index_q_ptr + token * (NUM_KV_HEADS * INDEX_DIM) + kv_head * INDEX_DIM
        _store_scaled(out, live, first, second, rest, 1.0, INDEX_Q_MANTISSA, INDEX_DIM, HALF, HALF_PADDED, INDEX_REST)
        return
    program -= kv_programs
    if program < 2 * kv_programs:
        token = (program % kv_programs * KV_TOKENS + tl.arange(0, KV_TOKENS)).to(tl.int64)[:, None, None]
        slot = tl.load(slots_ptr + token, mask=token < num_tokens, other=-1)
        page, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
        live = (slot >= 0) & (kv_head < NUM_KV_HEADS)
        if program < kv_programs:
            first, second, rest = _norm_rope(
                projected_ptr + token * projected_token + k_start + kv_head * HEAD_DIM, live, k_weight_ptr,
                positions_ptr, cos_sin_ptr, token, num_tokens, max_positions, COS_SIN_STRIDE, eps,
                HEAD_DIM, HALF, HALF_PADDED, HEAD_REST,
            )  # fmt: skip
            out = k_pages_ptr + (page * k_page + offset * k_page_token + kv_head * k_page_head) * UNIT
            _store_scaled(out, live, first, second, rest, k_scale, KV_MANTISSA, HEAD_DIM, HALF, HALF_PADDED, HEAD_REST)
        else:
            dim = tl.arange(0, HEAD_DIM)[None, None, :]
            v = tl.load(projected_ptr + token * projected_token + v_start + kv_head * HEAD_DIM + dim, mask=live)
            out = v_pages_ptr + (page * v_page + offset * v_page_token + kv_head * v_page_head) * UNIT
            tl.store(out + dim, to_cache(v, v_scale, KV_MANTISSA), mask=live)
        return
    program -= 2 * kv_programs
    token = (program * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None, None]
    slot = tl.load(slots_ptr + token, mask=token < num_tokens, other=-1)
    page, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    live = slot >= 0
    first, second, rest = _norm_rope(
        projected_ptr + token * projected_token + index_k_start, live, index_k_weight_ptr,
        positions_ptr, cos_sin_ptr, token, num_tokens, max_positions, COS_SIN_STRIDE, eps,
        INDEX_DIM, HALF, HALF_PADDED, INDEX_REST,
    )  # fmt: skip
    out = index_k_pages_ptr + (page * index_page + offset * index_page_token) * UNIT
    _store_scaled(out, live, first, second, rest, 1.0, INDEX_K_MANTISSA, INDEX_DIM, HALF, HALF_PADDED, INDEX_REST)


@jit
def _norm_rope(
    x_ptr, live, weight_ptr, positions_ptr, cos_sin_ptr, token, num_tokens, max_positions, COS_SIN_STRIDE, eps,
    DIM: tl.constexpr, HALF: tl.constexpr, HALF_PADDED: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Norm and rotate heads ``[tokens, heads, DIM]``, in fp32.

    A head is read as three pieces, so that each channel is loaded once: the two halves of the channels that rope
    pairs, and the rest. Pieces are padded to powers of two; padding is 0.
    """
    half, rest = tl.arange(0, HALF_PADDED)[None, None, :], 2 * HALF + tl.arange(0, REST)[None, None, :]
    in_half, in_rest = half < HALF, rest < DIM
    # A padding token's position may be anything.
    position = tl.load(positions_ptr + token, mask=token < num_tokens, other=0)
    position = tl.minimum(tl.maximum(position, 0), max_positions - 1)
    x1 = tl.load(x_ptr + half, mask=live & in_half, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + HALF + half, mask=live & in_half, other=0.0).to(tl.float32)
    x3 = tl.load(x_ptr + rest, mask=live & in_rest, other=0.0).to(tl.float32)
    w1 = tl.load(weight_ptr + half, mask=in_half, other=0.0).to(tl.float32) + 1.0
    w2 = tl.load(weight_ptr + HALF + half, mask=in_half, other=0.0).to(tl.float32) + 1.0
    w3 = tl.load(weight_ptr + rest, mask=in_rest, other=0.0).to(tl.float32) + 1.0
    cos_sin_ptr += position * COS_SIN_STRIDE
    cos = tl.load(cos_sin_ptr + half, mask=in_half, other=0.0).to(tl.float32)
    sin = tl.load(cos_sin_ptr + HALF + half, mask=in_half, other=0.0).to(tl.float32)

    mean_square = (tl.sum(x1 * x1, 2) + tl.sum(x2 * x2, 2) + tl.sum(x3 * x3, 2)) / DIM
    norm = tl.rsqrt(mean_square + eps)[:, :, None]
    x1, x2, x3 = x1 * norm * w1, x2 * norm * w2, x3 * norm * w3
    return x1 * cos - x2 * sin, x2 * cos + x1 * sin, x3


@jit
def _store_scaled(
    out_ptr, live, first, second, third, scale, MANTISSA: tl.constexpr,
    DIM: tl.constexpr, HALF: tl.constexpr, HALF_PADDED: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    first, second = to_cache(first, scale, MANTISSA), to_cache(second, scale, MANTISSA)
    _store(out_ptr, live, first, second, to_cache(third, scale, MANTISSA), DIM, HALF, HALF_PADDED, REST)


@jit
def _store(
    out_ptr, live, first, second, third,
    DIM: tl.constexpr, HALF: tl.constexpr, HALF_PADDED: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Put the three pieces of each head together again, in the dtype of ``out_ptr``."""
    half, rest = tl.arange(0, HALF_PADDED)[None, None, :], 2 * HALF + tl.arange(0, REST)[None, None, :]
    in_half, in_rest = half < HALF, rest < DIM
    tl.store(out_ptr + half, first, mask=live & in_half)
    tl.store(out_ptr + HALF + half, second, mask=live & in_half)
    tl.store(out_ptr + rest, third, mask=live & in_rest)
