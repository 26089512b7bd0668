"""Compile every kernel before the first request, and allocate the largest workspace once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor

from .. import api
from ..batch import BLOCK_SIZE, Batch
from ..caches import LayerCaches
from ..norms import HeadNorms
from ..selection import Selection
from .sparse_attention import SHORT_STEP


@cache
def warm_up(
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    index_dim: int,
    selection: Selection,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    index_dtype: torch.dtype,
    device: torch.device,
    max_num_tokens: int,
    max_num_seqs: int,
    max_seq_len: int,
    rotary_dim: int = 64,
    rope_dtype: torch.dtype | None = None,
    index_q_dtype: torch.dtype | None = None,
    attend: Callable[..., Tensor] = api.attend,
) -> None:
    """Run every operation once in each of the ways a server will call it. Again with the same arguments: nothing.

    Takes one page of each cache, but workspace and time of the largest step: ``max_num_tokens`` tokens at the end of
    ``max_seq_len``, and ``max_num_seqs`` sequences of that length. Which compiled kernels a step takes follows from
    its shapes alone, so one step is run for each choice that they may lead to.

    Args:
        num_heads, num_kv_heads: of the layer on this rank.
        dtype: of activations and the model's norms.
        kv_dtype, index_dtype: of the caches.
        max_num_tokens: of a step.
        max_num_seqs: of a step.
        max_seq_len: of a sequence.
        rotary_dim: channels that rope rotates.
        rope_dtype: of the rope table, ``dtype`` if None.
        index_q_dtype: of index queries, ``dtype`` if None.
        attend: what layers call in place of :func:`msa_backend.kernels.api.attend`. Where it exchanges something with
            other ranks, all of them warm up at once.
    """
    kv = torch.zeros(1, num_kv_heads, BLOCK_SIZE, 2 * head_dim, dtype=kv_dtype, device=device)
    index_k_pages = torch.zeros(1, BLOCK_SIZE, index_dim, dtype=index_dtype, device=device)
    k_pages, v_pages = kv.split(head_dim, dim=-1)
    caches = LayerCaches(k_pages, v_pages, index_k_pages)
    weight, index_weight = (torch.zeros(dim, dtype=dtype, device=device) for dim in (head_dim, index_dim))
    rope = torch.zeros(BLOCK_SIZE, rotary_dim, dtype=rope_dtype or dtype, device=device)
    norms = HeadNorms(weight, weight, index_weight, index_weight, rope, 1e-6)
    width = (num_heads + 2 * num_kv_heads) * head_dim + (num_kv_heads + 1) * index_dim
    for num_seqs, query_len, seq_len in _steps(max_num_tokens, max_num_seqs, max_seq_len):
        num_tokens = num_seqs * query_len
        projected = torch.zeros(num_tokens, width, dtype=dtype, device=device)
        positions = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        slots = torch.full((num_tokens,), -1, device=device)
        q, index_q = api.norm_rope_write(projected, positions, norms, caches, slots, index_q_dtype=index_q_dtype)
        batch = _batch(num_seqs, query_len, seq_len, -(-max_seq_len // BLOCK_SIZE), device)
        attend(q, index_q, caches, batch, selection, 1.0)


def _steps(max_num_tokens: int, max_num_seqs: int, max_seq_len: int) -> Iterator[tuple[int, int, int]]:
    """Sequences, tokens of each and length of each: one step for everything that a kernel is compiled for."""
    # Top-k is compiled for the number of blocks, rounded up to a power of two.
    seq_lens = [BLOCK_SIZE << i for i in range(32) if BLOCK_SIZE << i < max_seq_len] + [max_seq_len]
    # Scoring is compiled for the query length of short sequences, rounded up likewise, and attention of long ones for
    # how many tokens may share a block.
    query_lens = {*(1 << i for i in range(32)), SHORT_STEP + 1, max_num_tokens}
    for query_len in sorted(query_lens):
        for seq_len in seq_lens:
            if query_len <= min(seq_len, max_num_tokens):
                yield 1, query_len, seq_len
    # Of few sequences, each token's top-k has more warps than of many.
    for seq_len in seq_lens:
        yield min(max_num_seqs, max_num_tokens), 1, seq_len


def _batch(num_seqs: int, query_len: int, seq_len: int, table_width: int, device: torch.device) -> Batch:
    """Equal sequences, all of them over page 0 alone."""
    return Batch(
        cu_seqlens_q=torch.arange(num_seqs + 1, dtype=torch.int32, device=device) * query_len,
        seq_lens=torch.full((num_seqs,), seq_len, dtype=torch.int32, device=device),
        block_table=torch.zeros(num_seqs, table_width, dtype=torch.int32, device=device),
        max_query_len=query_len,
        max_seq_len=seq_len,
    )
