"""SGLang's token-major slot pools seen as pages of 128 tokens, by strides alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from msa_backend.config import MSAError
from msa_backend.kernels.batch import BLOCK_SIZE

if TYPE_CHECKING:
    from sglang.srt.mem_cache.memory_pool import MiniMaxSparseKVPool


class Pages(NamedTuple):
    """The caches of one sparse layer; page 0 is where SGLang lets padding be written.

    Attributes:
        k, v: ``[num_pages, num_kv_heads, 128, head_dim]``.
        index_k: ``[num_pages, 128, index_dim]``.
    """

    k: torch.Tensor
    v: torch.Tensor
    index_k: torch.Tensor


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
            f"the KV cache has pages of {page_size} tokens, but MSA needs {BLOCK_SIZE}, one page a sparse block; "
            f"pass --page-size {BLOCK_SIZE}"
        )


def pages_of(pool: MiniMaxSparseKVPool, layer_id: int) -> Pages:
    """The caches of a sparse layer, shared with SGLang and copied nowhere."""
    k, v = pool.get_kv_buffer(layer_id)
    return Pages(heads_first(k), heads_first(v), heads_first(pool.get_index_k_buffer(layer_id))[:, 0])


def heads_first(slots: torch.Tensor) -> torch.Tensor:
    """``[slots, heads, dim]`` as ``[pages, heads, 128, dim]``; slots past the last whole page are never given out."""
    num_pages = slots.shape[0] // BLOCK_SIZE
    return slots[: num_pages * BLOCK_SIZE].unflatten(0, (num_pages, BLOCK_SIZE)).transpose(1, 2)
