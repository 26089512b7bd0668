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


def batch(num_seqs: int, query_len: int, seq_len: int, max_pages: int | None = None) -> Batch:
    row = torch.arange(num_seqs + 1, dtype=torch.int32)
    pages = max_pages or -(-seq_len // BLOCK_SIZE)
    return Batch(
        cu_seqlens_q=row * query_len,
        seq_lens=row[1:] * 0 + seq_len,
        context_lens=row[1:] * 0 + seq_len - query_len,
        block_table=torch.arange(num_seqs * pages, dtype=torch.int32).view(num_seqs, pages),
        max_query_len=query_len,
        max_seq_len=seq_len,
    )


def step(
    num_seqs: int,
    query_len: int,
    seq_len: int,
    *,
    kv_heads: int = 4,
    heads: int = 64,
    dim: int = 128,
    topk: int = 16,
    cache_dtype: torch.dtype = BF16,
    index_q_dtype: torch.dtype | None = None,
    max_pages: int | None = None,
    num_pages: int | None = None,
) -> None:
    """One sparse layer of a step as the engines' adapters run it: norm, rope and write, select, attend."""
    rotary_dim = dim // 2
    rows = batch(num_seqs, query_len, seq_len, max_pages)
    num_tokens = num_seqs * query_len
    scales = scales_of(cache_dtype)
    k_pages, v_pages, index_k_pages = cache(num_pages or rows.block_table.numel(), kv_heads, dim, cache_dtype)
    slots = torch.arange(num_tokens)
    q, index_q = gpu.norm_rope_write(
        torch.randn(num_tokens, (heads + 3 * kv_heads + 1) * dim, dtype=BF16), slots,
        torch.randn(131_072, rotary_dim, dtype=BF16), *torch.randn(4, dim, dtype=BF16),
        k_pages, v_pages, index_k_pages, slots, num_heads=heads, eps=1e-6,
        index_q_dtype=index_q_dtype, **scales,
    )  # fmt: skip
    block_ids = gpu.select_blocks(index_q, index_k_pages, rows, topk=topk)
    gpu.sparse_attention(q, k_pages, v_pages, block_ids, rows, scale=dim**-0.5, **scales)


def write(num_tokens: int, *, kv_heads: int = 4, dim: int = 128, cache_dtype: torch.dtype = BF16) -> None:
    """The write alone, of a sparse layer and of a dense one."""
    k_pages, v_pages, index_k_pages = cache(10, kv_heads, dim, cache_dtype)
    slots = torch.arange(num_tokens)
    k, v = torch.randn(num_tokens, 2 * kv_heads, dim, dtype=BF16).chunk(2, dim=1)
    scales = scales_of(cache_dtype)
    gpu.write_cache(k, v, k[:, 0], k_pages, v_pages, index_k_pages, slots, **scales)
    gpu.write_cache(k, v, None, k_pages, v_pages, None, slots, **scales)


def cache(num_pages: int, kv_heads: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    k_pages, v_pages = torch.randn(num_pages, kv_heads, BLOCK_SIZE, 2 * dim, dtype=BF16).to(dtype).chunk(2, dim=-1)
    return k_pages, v_pages, torch.randn(num_pages, BLOCK_SIZE, dim, dtype=BF16).to(dtype)


def scales_of(cache_dtype: torch.dtype) -> dict[str, float]:
    return {"k_scale": 0.5, "v_scale": 0.25} if cache_dtype == E4M3 else {}


def prefill() -> None:
    step(1, 8192, 131072)


def suffix() -> None:
    step(1, 171, 55339)


def decode() -> None:
    step(8, 1, 131072)


def verify() -> None:
    step(8, 8, 50000)


def everything() -> None:
    """The released model alone and as one rank of four, both caches."""
    for heads in ({}, {"kv_heads": 1, "heads": 16}):
        for cache_dtype in (BF16, E4M3):
            write(100, cache_dtype=cache_dtype)
            for num_seqs, query_len, seq_len in ((1, 8192, 131072), (1, 171, 55339), (8, 1, 131072), (8, 8, 50000)):
                step(num_seqs, query_len, seq_len, cache_dtype=cache_dtype, **heads)


def fp8_products() -> None:
    """Index queries in fp8 as well as the keys."""
    for num_seqs, query_len, seq_len in ((1, 8192, 131072), (8, 1, 131072), (8, 8, 50000)):
        step(num_seqs, query_len, seq_len, cache_dtype=E4M3, index_q_dtype=E4M3)


def corners() -> None:
    """The largest and smallest that the operations take."""
    for extreme in ({"topk": 32}, {"dim": 16, "topk": 1, "kv_heads": 3, "heads": 9}):
        for num_seqs, query_len, seq_len in ((1, 512, 9000), (8, 1, 5000), (2, 16, 5000)):
            step(num_seqs, query_len, seq_len, **extreme)


def small() -> None:
    """Every kernel once, small enough for a memory checker."""
    for heads in ({}, {"kv_heads": 1, "heads": 12}):
        for cache_dtype in (BF16, E4M3):
            write(100, cache_dtype=cache_dtype)
            for num_seqs, query_len, seq_len in ((2, 300, 3500), (3, 1, 5000), (2, 5, 4000), (1, 20, 90_000)):
                step(num_seqs, query_len, seq_len, cache_dtype=cache_dtype, **heads)
                if cache_dtype == E4M3:
                    step(num_seqs, query_len, seq_len, cache_dtype=E4M3, index_q_dtype=E4M3, **heads)
