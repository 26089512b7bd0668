"""What both engines' attention does to its heads. Free of both."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from msa_backend.kernels.api import HeadNorms


def split_heads(attention: Any, qkv: Tensor, positions: Tensor, is_rotated: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a dense layer out of its one projection.

    Args:
        attention: has ``num_heads``, ``num_kv_heads``, ``head_dim``, ``q_norm``, ``k_norm`` and ``rotary_emb``.
        qkv: ``[num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]``.
        positions: ``[num_tokens]``.
        is_rotated: queries and keys are normed and rotated already.
    """
    kv_size = attention.num_kv_heads * attention.head_dim
    query, key, value = qkv.split([attention.num_heads * attention.head_dim, kv_size, kv_size], dim=-1)
    if not is_rotated:
        # Contiguous, because the engines' rope kernels write in place and the inputs are slices of one projection.
        query = _norm_heads(attention.q_norm, query, attention.head_dim)
        key = _norm_heads(attention.k_norm, key, attention.head_dim)
        query, key = attention.rotary_emb(positions, query, key)
    return query, key, value


def head_norms_of(attention: Any) -> HeadNorms:
    """The norms and the rope table of a sparse layer, as the kernels take them."""
    return HeadNorms(
        q_weight=attention.q_norm.weight,
        k_weight=attention.k_norm.weight,
        index_q_weight=attention.index_q_norm.weight,
        index_k_weight=attention.index_k_norm.weight,
        cos_sin_cache=attention.rotary_emb.cos_sin_cache,
        eps=attention.q_norm.variance_epsilon,
    )


def _norm_heads(norm: nn.Module, x: Tensor, head_dim: int) -> Tensor:
    """RMS-norm each head of ``[num_tokens, num_heads * head_dim]`` by itself; contiguous."""
    return norm(x.reshape(-1, head_dim)).view(x.shape)
