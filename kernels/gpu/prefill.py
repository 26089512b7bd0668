"""Rows with many query tokens: which kernel attends to which tokens, and how much is held at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..batch import BLOCK_SIZE, Batch
from .far import attend_far
from .near import attend_near, near_blocks
from .score import score_blocks
from .sizes import ceil_div, next_power_of_2
from .slices import token_slices
from .topk import select_topk

MAX_SCORE_BYTES = 1 << 30
"""Block scores held at a time: those of 8,192 tokens and 4 heads at a context of 1M."""
MAX_PARTIAL_BYTES = 9 << 28
"""Partial outputs held at a time: those of 8,192 tokens and 64 heads."""


def select_blocks(
    index_q: Tensor, index_k_pages: Tensor, batch: Batch, *, topk: int, init_blocks: int, local_blocks: int
) -> Tensor:
    """See :func:`msa_backend.kernels.api.select_blocks`."""
    num_tokens, num_heads, _ = index_q.shape
    num_blocks = ceil_div(batch.max_seq_len, BLOCK_SIZE)
    selection = {"topk": topk, "init_blocks": init_blocks, "local_blocks": local_blocks}
    at_a_time = num_tokens if num_blocks <= topk else max(1, MAX_SCORE_BYTES // (4 * num_heads * num_blocks))
    pieces = []
    for tokens, piece in token_slices(batch, num_tokens, at_a_time):
        scores = None
        if num_blocks > topk:
            scores = score_blocks(index_q[tokens], index_k_pages, piece, topk=topk, local_blocks=local_blocks)
        count = tokens.stop - tokens.start
        pieces.append(select_topk(scores, piece, num_tokens=count, num_heads=num_heads, **selection))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def sparse_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_ids: Tensor,
    batch: Batch,
    *,
    scale: float,
    k_scale: float,
    v_scale: float,
    out: Tensor,
) -> None:
    """See :func:`msa_backend.kernels.api.sparse_attention`."""
    num_tokens, num_heads, dim = q.shape
    num_kv_heads, _, topk = block_ids.shape
    near = near_blocks(topk)
    scales = {"scale": scale, "k_scale": k_scale, "v_scale": v_scale}
    if batch.min_context_len < near * BLOCK_SIZE:
        attend_near(q, k_pages, v_pages, block_ids, batch, out=out, **scales)
    if batch.max_seq_len <= near * BLOCK_SIZE:
        return
    # KV heads first: cutting there costs nothing, while fewer tokens at a time share fewer loads of a block.
    group = num_heads // num_kv_heads
    head_bytes = topk * next_power_of_2(group) * dim * q.element_size()
    tokens_at_a_time = min(num_tokens, max(1, MAX_PARTIAL_BYTES // head_bytes))
    heads_at_a_time = min(num_kv_heads, max(1, MAX_PARTIAL_BYTES // (head_bytes * tokens_at_a_time)))
    if (tokens_at_a_time, heads_at_a_time) == (num_tokens, num_kv_heads):
        attend_far(q, k_pages, v_pages, block_ids, batch, out=out, near_blocks=near, **scales)
        return
    for tokens, piece in token_slices(batch, num_tokens, tokens_at_a_time):
        for first in range(0, num_kv_heads, heads_at_a_time):
            kv_heads = slice(first, first + heads_at_a_time)
            heads = slice(first * group, (first + heads_at_a_time) * group)
            attend_far(
                q[tokens, heads],
                k_pages[:, kv_heads],
                v_pages[:, kv_heads],
                block_ids[kv_heads, tokens],
                piece,
                out=out[tokens, heads],
                near_blocks=near,
                **scales,
            )
