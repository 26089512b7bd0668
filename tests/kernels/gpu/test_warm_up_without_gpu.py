"""After the warm-up no step compiles anything: found without a GPU, by compiling alone."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from msa_backend.kernels import api, gpu
from msa_backend.kernels.dispatch import Choice
from msa_backend.kernels.gpu.warm_up import warm_up
from msa_backend.kernels.selection import Selection

from ..implementations import INTERPRETED
from . import launches
from .resources import compile_only, line

pytestmark = pytest.mark.skipif(INTERPRETED, reason="compiles nothing under the interpreter")

# Sequences, query tokens of each, length of each, and perhaps the host's bound of the query tokens.
STEPS = [
    (1, 1, 1), (1, 1, 77), (1, 1, 3000), (1, 1, 60_001), (3, 1, 2049), (13, 1, 40_000), (16, 1, 5000), (32, 1, 65_536),
    (1, 4, 300), (5, 4, 1003), (16, 4, 30_000), (31, 4, 9000), (2, 3, 500),
    (1, 17, 17), (1, 182, 17_900), (1, 128, 4096), (1, 3001, 3001), (1, 4096, 65_536), (2, 2000, 30_000), (3, 33, 9033),
    (1, 700, 1_000_000), (200, 1, 1_048_576), (7, 1, 1_048_576), (150, 1, 900_000), (1, 1, 600_000),
    # As graphs for any mix are captured: the query length may be all the tokens there are.
    (1, 1, 1_048_576, 1), (8, 1, 1_048_576, 8), (16, 1, 1_048_576, 16), (64, 1, 1_048_576, 64),
    (2, 200, 1_048_576, 400),
]  # fmt: skip


def test_layers_attend_in_their_own_way():
    """Where ranks share the scoring, the warm-up calls what their layers call, and nothing else."""
    seen = []
    with compile_only(90), mock.patch.object(api, "choose", lambda device: Choice(gpu, "a test's")):
        warm_up.__wrapped__(
            num_heads=16, num_kv_heads=1, head_dim=128, index_dim=128, selection=Selection(16),
            dtype=torch.bfloat16, kv_dtype=torch.bfloat16, index_dtype=torch.bfloat16, device=torch.device("meta"),
            max_num_tokens=4, max_num_seqs=2, max_seq_len=4096,
            attend=lambda q, index_q, caches, batch, selection, scale: seen.append((len(q), batch.max_seq_len)),
        )  # fmt: skip
    assert {(1, 4096), (4, 4096), (2, 4096)} <= set(seen)


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_nothing_is_compiled_later(cache_dtype: torch.dtype):
    """fp8 in both caches, and in the queries of the index branch beside them, which no other step has."""
    fp8 = cache_dtype if cache_dtype.itemsize == 1 else None
    # The cache and the width of the block table stay as they are while a server runs.
    shape = {"kv_heads": 1, "heads": 16, "cache_dtype": cache_dtype, "max_pages": 8192, "num_pages": 9001}
    shape["index_q_dtype"] = fp8
    with compile_only(90) as launched, mock.patch.object(api, "choose", lambda device: Choice(gpu, "a test's")):
        warm_up.__wrapped__(
            num_heads=16, num_kv_heads=1, head_dim=128, index_dim=128, selection=Selection(16),
            dtype=torch.bfloat16, kv_dtype=cache_dtype, index_dtype=cache_dtype, index_q_dtype=fp8,
            device=torch.device("meta"),
            max_num_tokens=4096, max_num_seqs=200, max_seq_len=1_048_576,
        )  # fmt: skip
        early = len(launched.compiled)
        assert early
        late = {}
        for step in STEPS:
            before = len(launched.compiled)
            num_seqs, query_len, seq_len, *bound = step
            launches.step(num_seqs, query_len, seq_len, **shape, **dict(zip(["max_query_len"], bound, strict=False)))
            late |= {line(c): step for c in launched.compiled[before:]}
    assert not launched.failed, "\n\n".join(launched.failed)
    assert not late, "\n".join(f"{step}: {c}" for c, step in late.items())
