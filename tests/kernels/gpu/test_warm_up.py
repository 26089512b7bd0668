"""After the warm-up no step compiles anything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from msa_backend.kernels import api
from msa_backend.kernels.norms import HeadNorms
from msa_backend.kernels.selection import Selection

from ..batches import Row, make_case
from ..implementations import ON_CUDA

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not ON_CUDA, reason="needs a CUDA device")]

HEADS, KV_HEADS, DIM, TOPK = 16, 1, 128, 16
STEPS = [
    [Row.of(1, n) for n in (1, 500, 3000)],
    [Row.of(1, n) for n in range(100, 1400, 100)],
    [Row.of(4, 1000 + n) for n in range(5)],
    [Row.of(182, 17_718)],
    [Row.of(3000)],
    [Row.of(700), Row.of(1, 2000), Row.of(33, 9000)],
    [Row.of(1, 60_000)],
]


@contextmanager
def compiled() -> Iterator[list[str]]:
    from triton import knobs

    names: list[str] = []

    def note(**what: Any) -> None:
        names.append(what["fn"].name)

    before, knobs.runtime.jit_post_compile_hook = knobs.runtime.jit_post_compile_hook, note
    try:
        yield names
    finally:
        knobs.runtime.jit_post_compile_hook = before


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_nothing_is_compiled_later(cache_dtype: torch.dtype):
    from msa_backend.kernels.gpu.warm_up import warm_up

    device = torch.device("cuda")
    dtype = torch.bfloat16
    index_q_dtype = cache_dtype if cache_dtype != dtype else None
    with compiled() as early:
        warm_up(
            num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, index_dim=DIM, selection=Selection(TOPK),
            dtype=dtype, kv_dtype=cache_dtype, index_dtype=cache_dtype, index_q_dtype=index_q_dtype, device=device,
            max_num_tokens=4096, max_num_seqs=32, max_seq_len=65_536,
        )  # fmt: skip
    assert early
    with compiled() as late:
        for rows in STEPS:
            case = make_case(
                rows, num_kv_heads=KV_HEADS, group=HEADS, dim=DIM, dtype=dtype, cache_dtype=cache_dtype,
                **({} if index_q_dtype is None else {"k_scale": 0.5, "v_scale": 3.0}),
            ).to("cuda")  # fmt: skip
            num_tokens = case.q.shape[0]
            width = (HEADS + 2 * KV_HEADS + KV_HEADS + 1) * DIM
            norms = HeadNorms(
                *torch.randn(4, DIM, dtype=dtype, device=device).unbind(),
                torch.rand(65_536, 64, dtype=dtype, device=device),
                1e-6,
            )
            q, index_q = api.norm_rope_write(
                torch.randn(num_tokens, width, dtype=dtype, device=device),
                torch.arange(num_tokens, device=device),
                norms,
                case.caches,
                torch.full((num_tokens,), -1, device=device),
                index_q_dtype=index_q_dtype,
            )
            api.attend(q, index_q, case.caches, case.batch, Selection(TOPK), case.scale)
        torch.cuda.synchronize()
    assert not late, f"compiled after the warm-up: {late}"
