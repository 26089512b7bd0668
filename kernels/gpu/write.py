"""Write the new tokens' keys, values and index keys into the paged cache, in one launch."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from ..batch import BLOCK_SIZE
from ..caches import LayerCaches
from .fp8 import storable, to_cache
from .launch import Options, kernel
from .pages import Pages, units
from .sizes import next_power_of_2
from .tiles import UNIT


def write(k: Tensor, v: Tensor, index_k: Tensor | None, caches: LayerCaches, slot_mapping: Tensor) -> None:
    """See :func:`msa_backend.kernels.api.write`."""
    num_tokens, num_kv_heads, head_dim = k.shape
    if num_tokens == 0:
        return
    pages = caches.keep(Pages)
    k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (k, v))
    k_pages, kv_mantissa = storable(caches.k_pages)
    v_pages, _ = storable(caches.v_pages)
    index_k_pages, index_mantissa = k_pages, 0
    index_strides: tuple[int, ...] = (0, 0)
    index_k_strides: tuple[int, ...] = (0,)
    if index_k is not None and caches.index_k_pages is not None:
        index_k_pages, index_mantissa = storable(caches.index_k_pages)
        index_k = index_k if index_k.stride(1) == 1 else index_k.contiguous()
        index_strides, index_k_strides = pages.index_strides, units("index_k", index_k.stride()[:1])
    msa_write(
        (num_tokens,),
        (
            k, v, k if index_k is None else index_k, k_pages, v_pages, index_k_pages, slot_mapping,
            caches.k_scale, caches.v_scale, *units("k", k.stride()[:2]), *units("v", v.stride()[:2]), *index_k_strides,
            *pages.kv_strides,
            *index_strides, slot_mapping.stride(0),
        ),
        (
            num_kv_heads, next_power_of_2(num_kv_heads), head_dim, 0 if index_k is None else caches.index_dim,
            BLOCK_SIZE, kv_mantissa, index_mantissa,
        ),
        Options(),
    )()  # fmt: skip


@kernel(unaligned=("slots_ptr",))
def msa_write(
    k_ptr, v_ptr, index_k_ptr, k_pages_ptr, v_pages_ptr, index_k_pages_ptr, slots_ptr, k_scale, v_scale,
    k_token, k_head, v_token, v_head, index_k_token,
    k_page, k_page_head, k_page_token, v_page, v_page_head, v_page_token, index_page, index_page_token, slots_token,
    NUM_HEADS: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, INDEX_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, KV_MANTISSA: tl.constexpr, INDEX_MANTISSA: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token * slots_token)
    if slot < 0:
        return
    page, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    head = tl.arange(0, HEADS)[:, None]
    dim = tl.arange(0, HEAD_DIM)[None, :]
    live = head < NUM_HEADS

    k = tl.load(k_ptr + (token * k_token + head * k_head) * UNIT + dim, mask=live)
    v = tl.load(v_ptr + (token * v_token + head * v_head) * UNIT + dim, mask=live)
    k_pages_ptr += (page * k_page + offset * k_page_token) * UNIT
    v_pages_ptr += (page * v_page + offset * v_page_token) * UNIT
    tl.store(k_pages_ptr + head * k_page_head * UNIT + dim, to_cache(k, k_scale, KV_MANTISSA), mask=live)
    tl.store(v_pages_ptr + head * v_page_head * UNIT + dim, to_cache(v, v_scale, KV_MANTISSA), mask=live)
    if INDEX_DIM > 0:
        index_dim = tl.arange(0, INDEX_DIM)
        index_k = tl.load(index_k_ptr + token * index_k_token * UNIT + index_dim)
        index_k_pages_ptr += (page * index_page + offset * index_page_token) * UNIT
        tl.store(index_k_pages_ptr + index_dim, to_cache(index_k, 1.0, INDEX_MANTISSA))
