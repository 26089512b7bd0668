"""From the fused projection to attention's inputs: norm, rotate, write the caches."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from ..caches import LayerCaches
from ..checks import query_heads
from ..norms import HeadNorms
from .write import write


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
    head_dim, index_dim, num_kv_heads = caches.head_dim, caches.index_dim, caches.num_kv_heads
    num_heads, kv_size = query_heads(projected, caches), num_kv_heads * head_dim
    parts = projected.split([num_heads * head_dim, kv_size, kv_size, num_kv_heads * index_dim, index_dim], dim=-1)
    q, k, v = (x.unflatten(-1, (-1, head_dim)) for x in parts[:3])
    index_q, index_k = (x.unflatten(-1, (-1, index_dim)) for x in parts[3:])

    table = norms.cos_sin_cache
    cos, sin = table[positions.clamp(0, table.shape[0] - 1)].float()[:, None].chunk(2, dim=-1)

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        x = rms_norm(x.float(), x.shape[-1:], weight.float() + 1, norms.eps)
        first, second = x[..., : norms.rotary_dim].chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin, x[..., norms.rotary_dim :]), dim=-1)

    write(normed(k, norms.k_weight), v, normed(index_k, norms.index_k_weight)[:, 0], caches, slot_mapping)
    index_q = normed(index_q, norms.index_q_weight)
    if index_q_dtype == torch.float8_e4m3fn:
        largest = index_q.abs().amax(dim=-1, keepdim=True)
        index_q = index_q * torch.where(largest > 0, torch.finfo(index_q_dtype).max / largest, 1.0)
    return normed(q, norms.q_weight).to(projected.dtype), index_q.to(index_q_dtype or projected.dtype)
