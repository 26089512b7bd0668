"""Write the new tokens' keys, values and index keys into the paged cache, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..batch import BLOCK_SIZE
from .fp8 import storable, to_cache
from .rows import STEP_ARGUMENTS
from .sizes import next_power_of_2


def write_cache(
    k: Tensor,
    v: Tensor,
    index_k: Tensor | None,
    k_pages: Tensor,
    v_pages: Tensor,
    index_k_pages: Tensor | None,
    slot_mapping: Tensor,
    *,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """See :func:`msa_backend.kernels.api.write_cache`."""
    num_tokens, num_kv_heads, head_dim = k.shape
    if num_tokens == 0:
        return
    k_pages, kv_mantissa = storable(k_pages)
    v_pages, _ = storable(v_pages)
    index_dim = index_mantissa = 0
    if index_k is not None and index_k_pages is not None:
        index_dim = index_k.shape[1]
        index_k_pages, index_mantissa = storable(index_k_pages)
    _write_cache[(num_tokens,)](
        k, v, index_k, k_pages, v_pages, index_k_pages, slot_mapping, k_scale, v_scale,
        *k.stride(), *v.stride(), *(index_k.stride() if index_k is not None else (0, 0)),
        *k_pages.stride()[:3], *v_pages.stride()[:3],
        *(index_k_pages.stride()[:2] if index_k_pages is not None else (0, 0)), slot_mapping.stride(0),
        NUM_HEADS=num_kv_heads, HEADS=next_power_of_2(num_kv_heads), HEAD_DIM=head_dim, INDEX_DIM=index_dim,
        BLOCK_SIZE=BLOCK_SIZE, KV_MANTISSA=kv_mantissa, INDEX_MANTISSA=index_mantissa,
    )  # fmt: skip


@triton.jit(do_not_specialize=STEP_ARGUMENTS)
def _write_cache(
    k_ptr, v_ptr, index_k_ptr, k_pages_ptr, v_pages_ptr, index_k_pages_ptr, slots_ptr, k_scale, v_scale,
    k_token, k_head, k_dim, v_token, v_head, v_dim, index_k_token, index_k_dim,
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

    k = tl.load(k_ptr + token * k_token + head * k_head + dim * k_dim, mask=live)
    v = tl.load(v_ptr + token * v_token + head * v_head + dim * v_dim, mask=live)
    k_pages_ptr += page * k_page + offset * k_page_token
    v_pages_ptr += page * v_page + offset * v_page_token
    tl.store(k_pages_ptr + head * k_page_head + dim, to_cache(k, k_scale, KV_MANTISSA), mask=live)
    tl.store(v_pages_ptr + head * v_page_head + dim, to_cache(v, v_scale, KV_MANTISSA), mask=live)
    if INDEX_DIM > 0:
        index_dim = tl.arange(0, INDEX_DIM)
        index_k = tl.load(index_k_ptr + token * index_k_token + index_dim * index_k_dim)
        index_k_pages_ptr += page * index_page + offset * index_page_token
        tl.store(index_k_pages_ptr + index_dim, to_cache(index_k, 1.0, INDEX_MANTISSA))
