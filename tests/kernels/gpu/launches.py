"""Every kernel as users launch it: for the resource table, the compile guard and compute-sanitizer.

Tensors go to torch's default device. On ``meta`` they have no values, and shapes may be those of the model; where
kernels run, values do not matter either, as long as the batch is sound.
"""

from __future__ import annotations

import torch
from torch import Tensor

from msa_backend.kernels import gpu
from msa_backend.kernels.batch import BLOCK_SIZE, Batch

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn


def batch(num_seqs: int, query_len: int, seq_len: int) -> Batch:
    row = torch.arange(num_seqs + 1, dtype=torch.int32)
    pages = -(-seq_len // BLOCK_SIZE)
    return Batch(
        cu_seqlens_q=row * query_len,
        seq_lens=row[1:] * 0 + seq_len,
        context_lens=row[1:] * 0 + seq_len - query_len,
        block_table=torch.arange(num_seqs * pages, dtype=torch.int32).view(num_seqs, pages),
        max_query_len=query_len,
        max_seq_len=seq_len,
    )


def layer(
    num_seqs: int,
    query_len: int,
    seq_len: int,
    *,
    kv_heads: int = 4,
    heads: int = 64,
    dim: int = 128,
    topk: int = 16,
    cache_dtype: torch.dtype = BF16,
) -> None:
    """One sparse layer: write, select, attend."""
    rotary_dim = dim // 2
    rows = batch(num_seqs, query_len, seq_len)
    num_tokens, num_pages = num_seqs * query_len, rows.block_table.numel()
    scales = {"k_scale": 0.5, "v_scale": 0.25} if cache_dtype == E4M3 else {}

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=BF16)

    k_pages, v_pages = normal(num_pages, kv_heads, BLOCK_SIZE, 2 * dim).to(cache_dtype).chunk(2, dim=-1)
    index_k_pages = normal(num_pages, BLOCK_SIZE, dim).to(cache_dtype)
    cache = k_pages, v_pages, index_k_pages
    slots = torch.arange(num_tokens)
    projected = normal(num_tokens, (heads + 3 * kv_heads + 1) * dim)
    k, v = (x.unflatten(-1, (kv_heads, dim)) for x in projected[:, : 2 * kv_heads * dim].chunk(2, dim=-1))
    gpu.write_cache(k, v, projected[:, -dim:], *cache, slots, **scales)
    gpu.write_cache(k, v, None, k_pages, v_pages, None, slots, **scales)
    q, index_q = gpu.norm_rope_write(
        projected, slots, normal(seq_len, rotary_dim), *normal(4, dim), *cache, slots,
        num_heads=heads, eps=1e-6, index_q_dtype=None, **scales,
    )  # fmt: skip
    block_ids = gpu.select_blocks(index_q, index_k_pages, rows, topk=topk)
    gpu.sparse_attention(q, k_pages, v_pages, block_ids, rows, scale=dim**-0.5, **scales)


def prefill() -> None:
    layer(1, 8192, 131072)


def suffix() -> None:
    layer(1, 171, 55339)


def decode() -> None:
    layer(8, 1, 131072)


def verify() -> None:
    layer(8, 8, 50000)


def everything() -> None:
    """The released model alone and as one rank of four, both caches."""
    for heads in ({}, {"kv_heads": 1, "heads": 16}):
        for cache_dtype in (BF16, E4M3):
            for num_seqs, query_len, seq_len in ((1, 8192, 131072), (1, 171, 55339), (8, 1, 131072), (8, 8, 50000)):
                layer(num_seqs, query_len, seq_len, cache_dtype=cache_dtype, **heads)


def corners() -> None:
    """The largest and smallest that the operations take."""
    for extreme in ({"dim": 256, "topk": 32}, {"dim": 16, "topk": 1, "kv_heads": 3, "heads": 9}):
        for num_seqs, query_len, seq_len in ((1, 512, 9000), (8, 1, 5000), (2, 16, 5000)):
            layer(num_seqs, query_len, seq_len, **extreme)


def small() -> None:
    """Every kernel once, small enough for a memory checker."""
    for heads in ({}, {"kv_heads": 1, "heads": 12}):
        for cache_dtype in (BF16, E4M3):
            for num_seqs, query_len, seq_len in ((2, 300, 3500), (3, 1, 5000), (2, 5, 4000), (1, 20, 90_000)):
                layer(num_seqs, query_len, seq_len, cache_dtype=cache_dtype, **heads)
