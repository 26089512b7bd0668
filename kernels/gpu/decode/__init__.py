"""Decode and verify: rows of a few query tokens, each over a long context.

The tokens and heads of a row are stacked, so that each index key is read once a row and each selected block once a
row and KV head; the context is split so that a few rows fill the chip.
"""

from __future__ import annotations

from torch import Tensor

from ...batch import BLOCK_SIZE, Batch
from ..topk import select_topk
from .attend import sparse_attention
from .score import score_blocks

__all__ = ["MAX_QUERY_LEN", "select_blocks", "sparse_attention"]

MAX_QUERY_LEN = 16
"""The longest row that these kernels take."""


def select_blocks(
    index_q: Tensor, index_k_pages: Tensor, batch: Batch, *, topk: int, init_blocks: int, local_blocks: int
) -> Tensor:
    """As :func:`msa_backend.kernels.api.select_blocks`, for rows of up to 16 query tokens."""
    scores = None
    if batch.max_seq_len > topk * BLOCK_SIZE:
        scores = score_blocks(index_q, index_k_pages, batch, topk=topk)
    return select_topk(
        scores,
        batch,
        num_tokens=index_q.shape[0],
        num_heads=index_q.shape[1],
        topk=topk,
        init_blocks=init_blocks,
        local_blocks=local_blocks,
    )
