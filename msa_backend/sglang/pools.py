"""SGLang's token-major slot pools seen as pages of 128 tokens, by strides alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from msa_backend.config import MSAError
from msa_backend.kernels.batch import BLOCK_SIZE
from msa_backend.kernels.caches import LayerCaches

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.mem_cache.memory_pool import MiniMaxSparseKVPool


def check_pool(pool: object, page_size: int) -> None:
    """Refuse a cache that is not the one SGLang makes for MiniMax-M3, or not in pages of 128 tokens.

    Raises:
        MSAError: with the one sentence for the user.
    """
    from sglang.srt.mem_cache.memory_pool import MiniMaxSparseKVPool

    if not isinstance(pool, MiniMaxSparseKVPool):
        raise MSAError(
            f"the KV cache is a {type(pool).__name__}, but MSA keeps its index keys in SGLang's MiniMaxSparseKVPool; "
            "leave out the options that choose another cache, or set MSA_DISABLE=1 to serve without msa-backend"
        )
    if page_size != BLOCK_SIZE:
        raise MSAError(
            f"the KV cache has pages of {page_size} tokens, but MSA needs {BLOCK_SIZE}, one KV-cache page per sparse "
            f"block; pass --page-size {BLOCK_SIZE}"
        )


def caches_of(pool: MiniMaxSparseKVPool, layer: RadixAttention, *, is_sparse: bool) -> LayerCaches:
    """The caches of a layer, shared with SGLang and copied nowhere; page 0 is where it lets padding be written."""
    k, v = pool.get_kv_buffer(layer.layer_id)
    index_k = heads_first(pool.get_index_k_buffer(layer.layer_id))[:, 0] if is_sparse else None
    scales = (layer.k_scale_float or 1.0, layer.v_scale_float or 1.0) if k.element_size() == 1 else ()
    return LayerCaches(heads_first(k), heads_first(v), index_k, *scales)


def heads_first(slots: torch.Tensor) -> torch.Tensor:
    """``[slots, heads, dim]`` as ``[pages, heads, 128, dim]``; slots past the last whole page are never given out."""
    num_pages = slots.shape[0] // BLOCK_SIZE
    return slots[: num_pages * BLOCK_SIZE].unflatten(0, (num_pages, BLOCK_SIZE)).transpose(1, 2)
