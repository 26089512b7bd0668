"""Dense attention: the sparse kernel, told to attend to every block."""

from __future__ import annotations

import torch
from torch import Tensor

from ..batch import BLOCK_SIZE, Batch
from ..caches import LayerCaches
from .paging import locate_tokens
from .sparse_attention import sparse_attention


def dense_attention(q: Tensor, caches: LayerCaches, batch: Batch, scale: float, out: Tensor | None = None) -> Tensor:
    """See :func:`msa_backend.kernels.api.dense_attention`."""
    block_ids = every_block(batch, q.shape[0], caches.num_kv_heads)
    return sparse_attention(q, caches, block_ids, batch, scale, out)


def every_block(batch: Batch, num_tokens: int, num_kv_heads: int) -> Tensor:
    """``[num_kv_heads, num_tokens, blocks]`` int32: all blocks that a token sees, then -1."""
    _, position = locate_tokens(batch, num_tokens)
    block = torch.arange(-(-batch.max_seq_len // BLOCK_SIZE), dtype=torch.int32, device=position.device)
    # A token that is padding stands at -1, in no block.
    seen = block <= position.div(BLOCK_SIZE, rounding_mode="floor")[:, None]
    return torch.where(seen, block, -1).expand(num_kv_heads, -1, -1)
