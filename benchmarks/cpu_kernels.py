"""How long selection and attention take on a CPU, beside the reference, in the shape of the released model.

Run ``python benchmarks/cpu_kernels.py``; ``--threads 1`` on a busy machine. Times are medians of alternating runs
of both, in one process, after one warm-up. The ratio is reference / CPU path.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from msa_backend.kernels import cpu, reference
from msa_backend.kernels.batch import BLOCK_SIZE, Batch
from msa_backend.kernels.caches import LayerCaches
from msa_backend.kernels.selection import Selection

NUM_HEADS, NUM_KV_HEADS, DIM, TOPK = 64, 4, 128, 16

# name: (sequences, new tokens of each, context of each, whether the reference can be waited for)
WORKLOADS = {
    "prefill 512 @ 0": (1, 512, 0, True),
    "prefill 2048 @ 0": (1, 2048, 0, True),
    "prefill 2048 @ 16K": (1, 2048, 16 * 1024, True),
    "prefill 2048 @ 128K": (1, 2048, 128 * 1024, False),
    "decode 32 @ 4K": (32, 1, 4 * 1024, True),
}


def make_batch(num_seqs: int, query_len: int, context_len: int) -> Batch:
    seq_len = context_len + query_len
    max_pages = -(-seq_len // BLOCK_SIZE)
    return Batch(
        cu_seqlens_q=torch.arange(num_seqs + 1, dtype=torch.int32) * query_len,
        seq_lens=torch.full((num_seqs,), seq_len, dtype=torch.int32),
        block_table=torch.randperm(num_seqs * max_pages).int().view(num_seqs, max_pages),
        max_query_len=query_len,
        max_seq_len=seq_len,
    )


def normal(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16).normal_()


def medians(functions: list[Callable[[], object]], repeats: int) -> list[float]:
    """Seconds of each, run in turns so that all meet the same machine, after one warm-up round."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(1 + repeats):
        for function, of_function in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            of_function.append(time.perf_counter() - start)
    return [median(of_function[1:]) for of_function in times]


def measure(num_seqs: int, query_len: int, context_len: int, with_reference: bool, repeats: int) -> list[list[float]]:
    """Medians of selection and of attention, each of the CPU path and then of the reference if wanted."""
    batch = make_batch(num_seqs, query_len, context_len)
    num_pages, num_tokens = batch.block_table.numel(), num_seqs * query_len
    q, index_q = normal(num_tokens, NUM_HEADS, DIM), normal(num_tokens, NUM_KV_HEADS, DIM)
    k_pages, v_pages = normal(num_pages, NUM_KV_HEADS, BLOCK_SIZE, 2 * DIM).chunk(2, dim=-1)
    index_k_pages = normal(num_pages, BLOCK_SIZE, DIM)
    caches = LayerCaches(k_pages, v_pages, index_k_pages)
    index = index_q, caches, batch, Selection(TOPK)
    attention = q, caches, cpu.select_blocks(*index), batch, DIM**-0.5
    select: list[Callable[[], object]] = [lambda: cpu.select_blocks(*index)]
    attend: list[Callable[[], object]] = [lambda: cpu.sparse_attention(*attention)]
    if with_reference:
        select.append(lambda: reference.select_blocks(*index, dtype=torch.float32))
        attend.append(lambda: reference.sparse_attention(*attention, dtype=torch.float32))
    return [medians(select, repeats), medians(attend, repeats)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="workloads whose name contains this")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    print(f"torch {torch.__version__}, {arguments.threads} threads; bf16, {NUM_HEADS} heads, {NUM_KV_HEADS} KV heads,")
    print(f"dim {DIM}, top-{TOPK}; ms, reference in fp32, ratio = reference / CPU path\n")
    print(f"{'':20}" + "".join(f"{op:>10}{'reference':>11}{'ratio':>7}" for op in ("select", "attend")))
    for name, workload in WORKLOADS.items():
        if arguments.only not in name:
            continue
        line = f"{name:20}"
        for ours, *theirs in measure(*workload, arguments.repeats):
            line += f"{ours * 1e3:10.1f}"
            line += f"{theirs[0] * 1e3:11.1f}{theirs[0] / ours:7.1f}" if theirs else f"{'-':>11}{'-':>7}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
