"""From the fused projection to attention's inputs: norm, rotate, write the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import norm_rope
from .cache import write_cache


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
    num_kv_heads, head_dim, index_dim = k_pages.shape[1], k_pages.shape[3], index_k_pages.shape[2]
    kv_size, index_size = num_kv_heads * head_dim, num_kv_heads * index_dim
    parts = projected.split([num_heads * head_dim, kv_size, kv_size, index_size, index_dim], dim=-1)
    q, k, v = (x.unflatten(-1, (-1, head_dim)) for x in parts[:3])
    index_q, index_k = (x.unflatten(-1, (-1, index_dim)) for x in parts[3:])

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        return norm_rope(x, weight, positions, cos_sin_cache, eps=eps, dtype=torch.float32)

    write_cache(
        normed(k, k_weight), v, normed(index_k, index_k_weight)[:, 0], k_pages, v_pages, index_k_pages, slot_mapping,
        k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip
    index_q = normed(index_q, index_q_weight)
    if index_q_dtype == torch.float8_e4m3fn:
        largest = index_q.abs().amax(dim=-1, keepdim=True)
        index_q = index_q * torch.where(largest > 0, torch.finfo(index_q_dtype).max / largest, 1.0)
    return normed(q, q_weight).to(projected.dtype), index_q.to(index_q_dtype or projected.dtype)
