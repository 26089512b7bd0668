"""After the warm-up no step compiles anything: found without a GPU, by compiling alone."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from msa_backend.kernels import api, gpu
from msa_backend.kernels.dispatch import Choice
from msa_backend.kernels.gpu.warm_up import warm_up

from ..implementations import INTERPRETED
from . import launches
from .resources import compile_only, line

pytestmark = pytest.mark.skipif(INTERPRETED, reason="compiles nothing under the interpreter")

# Rows, query tokens of each, length of each: odd and even ones, 1, multiples of 16. Triton compiles anew for some.
STEPS = [
    (1, 1, 1), (1, 1, 77), (1, 1, 3000), (1, 1, 60_001), (3, 1, 2049), (13, 1, 40_000), (16, 1, 5000), (32, 1, 65_536),
    (1, 4, 300), (5, 4, 1003), (16, 4, 30_000), (31, 4, 9000), (2, 3, 500),
    (1, 17, 17), (1, 182, 17_900), (1, 128, 4096), (1, 3001, 3001), (1, 4096, 65_536), (2, 2000, 30_000), (3, 33, 9033),
]  # fmt: skip


def test_nothing_is_compiled_later():
    cache_dtype = torch.bfloat16
    # The cache and the width of the block table stay as they are while a server runs.
    shape = {"kv_heads": 1, "heads": 16, "cache_dtype": cache_dtype, "max_pages": 512, "num_pages": 9001}
    with compile_only(90) as launched, mock.patch.object(api, "choose", lambda device: Choice(gpu, "a test's")):
        warm_up.__wrapped__(
            num_heads=16, num_kv_heads=1, head_dim=128, index_dim=128, topk=16, init_blocks=0, local_blocks=1,
            dtype=torch.bfloat16, kv_dtype=cache_dtype, index_dtype=cache_dtype, device=torch.device("meta"),
            max_num_tokens=4096, max_num_seqs=32, max_draft_tokens=3, max_seq_len=65_536,
        )  # fmt: skip
        early = len(launched.compiled)
        assert early
        late = {}
        for step in STEPS:
            before = len(launched.compiled)
            launches.step(*step, **shape)
            late |= {line(c): step for c in launched.compiled[before:]}
    assert not launched.failed, "\n\n".join(launched.failed)
    assert not late, "\n".join(f"{step}: {c}" for c, step in late.items())
