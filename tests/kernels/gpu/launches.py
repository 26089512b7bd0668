"""Every kernel as users launch it: for the resource table, the compile guard and compute-sanitizer.

Tensors go to torch's default device. On ``meta`` they have no values, and shapes may be those of the model; where
kernels run, values do not matter either, as long as the batch is sound.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from msa_backend.kernels import gpu
from msa_backend.kernels.batch import BLOCK_SIZE, Batch
from msa_backend.kernels.caches import LayerCaches
from msa_backend.kernels.norms import HeadNorms
from msa_backend.kernels.selection import Selection
from msa_backend.kernels.share import Share

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn


def batch(num_seqs: int, query_len: int, seq_len: int, max_pages: int | None = None) -> Batch:
    row = torch.arange(num_seqs + 1, dtype=torch.int32)
    pages = max_pages or -(-seq_len // BLOCK_SIZE)
    return Batch(
        cu_seqlens_q=row * query_len,
        seq_lens=row[1:] * 0 + seq_len,
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
    max_query_len: int | None = None,
) -> None:
    """One sparse layer of a step as the engines' adapters run it: norm, rope and write, then select and attend.

    Args:
        max_query_len: the host's upper bound, which is above the truth when a graph for any mix is recorded.
    """
    rows = batch(num_seqs, query_len, seq_len, max_pages)
    if max_query_len is not None:
        rows = replace(rows, max_query_len=max_query_len)
    num_tokens = num_seqs * query_len
    layer = caches(num_pages or rows.block_table.numel(), kv_heads, dim, cache_dtype)
    norms = HeadNorms(*torch.randn(4, dim, dtype=BF16), torch.randn(131_072, dim // 2, dtype=BF16), 1e-6)
    slots = torch.arange(num_tokens)
    q, index_q = gpu.norm_rope_write(
        torch.randn(num_tokens, (heads + 3 * kv_heads + 1) * dim, dtype=BF16), slots, norms, layer, slots,
        index_q_dtype=index_q_dtype,
    )  # fmt: skip
    gpu.attend(q, index_q, layer, rows, Selection(topk), dim**-0.5)


def write(num_tokens: int, *, kv_heads: int = 4, dim: int = 128, cache_dtype: torch.dtype = BF16) -> None:
    """The write alone, of a sparse layer and of a dense one."""
    layer = caches(10, kv_heads, dim, cache_dtype)
    slots = torch.arange(num_tokens)
    k, v = torch.randn(num_tokens, 2 * kv_heads, dim, dtype=BF16).chunk(2, dim=1)
    gpu.write(k, v, k[:, 0], layer, slots)
    gpu.write(k, v, None, replace(layer, index_k_pages=None), slots)


def shared(
    num_seqs: int, query_len: int, seq_len: int, *, heads: int = 4, ranks: int = 4, dim: int = 128, topk: int = 16,
    cache_dtype: torch.dtype = BF16,
) -> None:  # fmt: skip
    """What one of several ranks does where they share the scoring of blocks, up to its own head's choice."""
    rows = batch(num_seqs, query_len, seq_len)
    layer = caches(rows.block_table.numel(), 1, dim, cache_dtype)
    index_q, selection = torch.randn(num_seqs * query_len, heads, dim, dtype=BF16), Selection(topk)
    candidates = gpu.select_candidates(index_q, layer, rows, selection, Share(ranks - 1, ranks))
    gpu.merge_candidates(torch.stack([candidates] * ranks)[:, :, :1], rows, selection)


def caches(num_pages: int, kv_heads: int, dim: int, dtype: torch.dtype) -> LayerCaches:
    k_pages, v_pages = torch.randn(num_pages, kv_heads, BLOCK_SIZE, 2 * dim, dtype=BF16).to(dtype).chunk(2, dim=-1)
    index_k_pages = torch.randn(num_pages, BLOCK_SIZE, dim, dtype=BF16).to(dtype)
    scales = (0.5, 0.25) if dtype == E4M3 else ()
    return LayerCaches(k_pages, v_pages, index_k_pages, *scales)


def prefill() -> None:
    step(1, 8192, 131072)


def suffix() -> None:
    step(1, 171, 55339)


def decode() -> None:
    step(8, 1, 131072)


def verify() -> None:
    step(8, 8, 50000)


def mixed() -> None:
    """As a graph for any mix of 64 tokens is recorded."""
    step(64, 1, 131072, max_query_len=64)


def everything() -> None:
    """The released model alone and as one rank of four, both caches."""
    for heads in ({}, {"kv_heads": 1, "heads": 16}):
        for cache_dtype in (BF16, E4M3):
            write(100, cache_dtype=cache_dtype)
            for num_seqs, query_len, seq_len in ((1, 8192, 131072), (1, 171, 55339), (8, 1, 131072), (8, 8, 50000)):
                step(num_seqs, query_len, seq_len, cache_dtype=cache_dtype, **heads)
            step(64, 1, 131072, cache_dtype=cache_dtype, max_query_len=64, **heads)
    for num_seqs, query_len, seq_len in ((1, 8192, 131072), (1, 171, 55339), (8, 1, 1048576), (8, 8, 50000)):
        shared(num_seqs, query_len, seq_len)


def each_once() -> None:
    """Every kernel at least once, in the forms of a whole model in bf16 and of its decode step in fp8."""
    write(100)
    for launch in (prefill, suffix, decode, verify, mixed):
        launch()
    step(8, 1, 131072, cache_dtype=E4M3, index_q_dtype=E4M3)
    shared(8, 1, 1048576)


def fp8_products() -> None:
    """Index queries in fp8 as well as the keys."""
    for num_seqs, query_len, seq_len in ((1, 8192, 131072), (8, 1, 131072), (8, 8, 50000)):
        step(num_seqs, query_len, seq_len, cache_dtype=E4M3, index_q_dtype=E4M3)
    step(64, 1, 131072, cache_dtype=E4M3, index_q_dtype=E4M3, max_query_len=64)


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
                shared(num_seqs, query_len, seq_len, cache_dtype=cache_dtype, ranks=3)
                step(num_seqs, query_len, seq_len, cache_dtype=cache_dtype, **heads)
                if cache_dtype == E4M3:
                    step(num_seqs, query_len, seq_len, cache_dtype=E4M3, index_q_dtype=E4M3, **heads)
