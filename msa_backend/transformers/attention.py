"""The attention of ``transformers``' MiniMax-M3 by the kernels of MSA.

Projections, norms, rope, the cache and the choice of blocks stay those of ``transformers``. Its own attention makes
masks of ``[heads, queries, keys]``; this makes none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from msa_backend.config import MSAError
from msa_backend.kernels import api as kernels
from msa_backend.kernels.batch import BLOCK_SIZE, Batch

from . import dense


def register(name: str, attend: Callable[..., Any]) -> None:
    """Make ``attn_implementation=name`` call ``attend`` with what :func:`attention` takes."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, _batch)


def _batch(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    config: Any = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Batch:
    """What all layers of a step are given in place of a mask: the rows as sequences whose pages lie in order.

    Args:
        kv_length: tokens that the layers are given, the new ones counted.
        q_offset: tokens in the cache.
        attention_mask: ``[batch_size, tokens]`` bool, False for padding.
        allow_is_causal_skip: whether every token sees all before it in its row.

    Raises:
        MSAError: a row is more, or other, than a sequence whose padding comes last.
    """
    block_size = getattr(config, "index_block_size", None)
    if block_size is None:
        raise MSAError(
            f"attn_implementation is MSA's, but the model is of type {getattr(config, 'model_type', None)}, which has "
            'no MSA layers; pass attn_implementation="sdpa"'
        )
    if block_size != BLOCK_SIZE:
        raise MSAError(f"index_block_size is {block_size}, but MSA's kernels need {BLOCK_SIZE}; use another checkpoint")
    if isinstance(q_offset, Tensor) or kv_length != q_offset + q_length:
        raise MSAError("the cache is static, but MSA reads a growing one; leave cache_implementation out")
    if not allow_is_causal_skip:
        raise MSAError(
            "the rows hold several sequences or are not causal, but MSA takes one causal sequence in a row; pass "
            "each in a row of its own"
        )
    if attention_mask is not None and bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any()):
        raise MSAError(
            "attention_mask hides tokens before others, which would move the blocks; pass prompts of one length, or "
            "one prompt at a time"
        )
    num_pages = -(-kv_length // BLOCK_SIZE)
    pages = torch.arange(batch_size * num_pages, dtype=torch.int32, device=device)
    return Batch(
        cu_seqlens_q=torch.arange(0, (batch_size + 1) * q_length, q_length, dtype=torch.int32, device=device),
        seq_lens=torch.full((batch_size,), kv_length, dtype=torch.int32, device=device),
        block_table=pages.view(batch_size, num_pages),
        max_query_len=q_length,
        max_seq_len=kv_length,
    )


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Batch | Tensor | None,
    scaling: float,
    block_indices: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What ``transformers`` calls as the attention of a layer.

    Args:
        module: the layer's attention. One of the vision tower is left to ``transformers``.
        query: ``[batch_size, num_heads, n, head_dim]``.
        key, value: ``[batch_size, num_kv_heads, seq_len, head_dim]``, the new tokens' at their end.
        block_indices: ``[batch_size, num_kv_heads, n, any]`` int64 in any order, -1 after the last; None in a dense
            layer.

    Returns:
        ``[batch_size, n, num_heads, head_dim]``, and None for the weights, which nobody makes.

    Raises:
        MSAError: gradients are asked for, or the mask is one of the caller's own.
    """
    if not hasattr(module, "indexer"):
        from transformers import AttentionInterface

        return AttentionInterface()["sdpa"](module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if torch.is_grad_enabled() and query.requires_grad:
        raise MSAError("gradients are on, but MSA's kernels have no backward pass; call under torch.inference_mode()")
    if not isinstance(attention_mask, Batch):
        raise MSAError("the attention mask has 4 dimensions, but MSA makes its own; pass one of [batch, tokens]")
    batch = attention_mask
    if block_indices is None:
        seq_len, n = key.shape[2], query.shape[2]
        positions = torch.arange(seq_len - n, seq_len, device=query.device)
        rows = zip(query, key, value, strict=True)
        return torch.stack([dense.attention(q, k, v, positions, scaling) for q, k, v in rows]), None
    block_ids = ascending(block_indices, module.indexer.topk_blocks).transpose(0, 1).flatten(1, 2)
    caches = kernels.LayerCaches(_pages(key), _pages(value))
    q = query.transpose(1, 2)
    out = kernels.sparse_attention(q.flatten(0, 1), caches, block_ids, batch, scaling)
    return out.unflatten(0, q.shape[:2]), None


def ascending(block_ids: Tensor, topk: int) -> Tensor:
    """``[..., topk]`` int32 of ``[..., any]`` in any order, -1 after the last as before."""
    last = torch.iinfo(torch.int32).max
    block_ids = block_ids.masked_fill(block_ids < 0, last).sort(-1).values
    block_ids = pad(block_ids, (0, topk - block_ids.shape[-1]), value=last)
    return block_ids.masked_fill(block_ids == last, -1).int()


def _pages(x: Tensor) -> Tensor:
    """``[batch_size * pages, num_kv_heads, 128, head_dim]`` of ``[batch_size, num_kv_heads, seq_len, head_dim]``."""
    x = pad(x, (0, 0, 0, -x.shape[2] % BLOCK_SIZE))
    return x.unflatten(2, (-1, BLOCK_SIZE)).transpose(1, 2).flatten(0, 1)
