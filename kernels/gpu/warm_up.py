"""Compile every kernel before the first request, and allocate the largest workspace once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch

from .. import api
from ..batch import BLOCK_SIZE, Batch


@cache
def warm_up(
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    index_dim: int,
    topk: int,
    init_blocks: int,
    local_blocks: int,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    index_dtype: torch.dtype,
    device: torch.device,
    max_num_tokens: int,
    max_num_seqs: int,
    max_draft_tokens: int,
    max_seq_len: int,
    rotary_dim: int = 64,
) -> None:
    """Run every operation once in each of the ways a server will call it. Again with the same arguments: nothing.

    Takes one page of each cache, but workspace and time of the largest step: ``max_num_tokens`` tokens at the end of
    ``max_seq_len``, and ``max_num_seqs`` rows of that length. Triton compiles anew for arguments that are 1 or
    divisible by 16, and the operations choose kernels by the lengths of a step, so steps of many shapes are run.

    Args:
        num_heads, num_kv_heads: of the layer on this rank.
        dtype: of activations and the model's norms.
        kv_dtype, index_dtype: of the caches.
        max_num_tokens: of a step.
        max_num_seqs: of a step.
        max_draft_tokens: to verify in one row.
        max_seq_len: of a sequence.
        rotary_dim: channels that rope rotates.
    """
    kv = torch.zeros(1, num_kv_heads, BLOCK_SIZE, 2 * head_dim, dtype=kv_dtype, device=device)
    k_pages, v_pages = kv.split(head_dim, dim=-1)
    index_k_pages = torch.zeros(1, BLOCK_SIZE, index_dim, dtype=index_dtype, device=device)
    cos_sin_cache = torch.zeros(max_seq_len, rotary_dim, dtype=dtype, device=device)
    head_weight = torch.zeros(head_dim, dtype=dtype, device=device)
    index_weight = torch.zeros(index_dim, dtype=dtype, device=device)
    width = (num_heads + 2 * num_kv_heads) * head_dim + (num_kv_heads + 1) * index_dim
    for num_seqs, query_len, seq_len in _steps(max_num_tokens, max_num_seqs, max_draft_tokens, max_seq_len):
        num_tokens = num_seqs * query_len
        projected = torch.zeros(num_tokens, width, dtype=dtype, device=device)
        positions = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        slots = torch.full((num_tokens,), -1, device=device)
        q, index_q = api.norm_rope_write(
            projected, positions, cos_sin_cache, head_weight, head_weight, index_weight, index_weight,
            k_pages, v_pages, index_k_pages, slots,
            num_heads=num_heads, eps=1e-6,
        )  # fmt: skip
        batch = _batch(num_seqs, query_len, seq_len, -(-max_seq_len // BLOCK_SIZE), device)
        block_ids = api.select_blocks(
            index_q, index_k_pages, batch, topk=topk, init_blocks=init_blocks, local_blocks=local_blocks
        )
        api.sparse_attention(q, k_pages, v_pages, block_ids, batch, scale=1.0, out=torch.empty_like(q))


def _steps(
    max_num_tokens: int, max_num_seqs: int, max_draft_tokens: int, max_seq_len: int
) -> Iterator[tuple[int, int, int]]:
    """Rows, tokens of each and length of each: one step for everything that a kernel is compiled for."""
    doubling = [BLOCK_SIZE << i for i in range(32) if BLOCK_SIZE << i < max_seq_len] + [max_seq_len]
    decode = sorted({1, 1 + max_draft_tokens})
    for query_len in sorted({1, 2, 4, 8, 16, 17, 100, max_num_tokens} | set(decode)):
        for seq_len in doubling:
            if query_len <= min(seq_len, max_num_tokens):
                yield 1, query_len, seq_len
    # The context of a few rows is split over more programs than that of many, and a short one over fewer.
    for query_len in decode:
        for num_seqs in range(1, min(max_num_seqs, max_num_tokens // query_len) + 1):
            yield num_seqs, query_len, max_seq_len
        for seq_len in range(BLOCK_SIZE, min(32 * BLOCK_SIZE, max_seq_len) + 1, BLOCK_SIZE):
            yield 1, query_len, seq_len
    for num_seqs in (1 << i for i in range(max_num_seqs.bit_length())):
        query_len = min(max_num_tokens // num_seqs, 17)
        for seq_len in (200, min(20_000, max_seq_len)):
            if query_len:
                yield num_seqs, query_len, seq_len


def _batch(num_seqs: int, query_len: int, seq_len: int, table_width: int, device: torch.device) -> Batch:
    """Equal rows, all of them over page 0 alone."""

    def same(value: int) -> torch.Tensor:
        return torch.full((num_seqs,), value, dtype=torch.int32, device=device)

    return Batch(
        cu_seqlens_q=torch.arange(num_seqs + 1, dtype=torch.int32, device=device) * query_len,
        seq_lens=same(seq_len),
        context_lens=same(seq_len - query_len),
        block_table=torch.zeros(num_seqs, table_width, dtype=torch.int32, device=device),
        max_query_len=query_len,
        max_seq_len=seq_len,
    )
