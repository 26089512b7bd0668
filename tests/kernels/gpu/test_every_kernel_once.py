"""Every kernel once at small shapes, which is what a memory checker has time for:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
        python -m pytest -s tests/kernels/gpu/test_every_kernel_once.py

Without torch's cache every tensor is an allocation of its own, so a step past its end is one into nothing, and found.
"""

from __future__ import annotations

import pytest
import torch

from msa_backend.kernels import api
from msa_backend.kernels.selection import Selection

from ..batches import Row, make_case
from ..implementations import ON_CUDA
from . import launches

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not ON_CUDA, reason="needs a CUDA device")]

BATCHES = {
    "decode": [Row.of(1, 40), Row.of(1, 5000), Row.of(1, 2047), Row(1, 0, 0), Row(1, -1, 0)],
    "verify": [Row.of(4, 40), Row.of(8, 5000), Row.of(0, 9), Row(3, 0, 0)],
    "mixed": [Row.of(40, 5000), Row.of(1, 300), Row.of(8, 2047), Row(1, 0, 0)],
    "prefill": [Row.of(600, 5000), Row.of(1, 300), Row.of(200), Row.of(0, 200), Row(2, 0, 0)],
    "long": [Row.of(20, 90_000), Row.of(1, 70_000)],
    "nothing_new": [Row.of(0, 300)],
    "no_rows": [],
}


@pytest.mark.parametrize("group", [16, 3])
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("kind", BATCHES)
def test_ragged_and_padded(kind: str, cache_dtype: torch.dtype, group: int):
    scales = {} if cache_dtype == torch.bfloat16 else {"k_scale": 0.5, "v_scale": 0.5}
    case = make_case(
        BATCHES[kind], group=group, dim=128, dtype=torch.bfloat16, cache_dtype=cache_dtype, padding_tail=3, **scales
    ).to("cuda")
    for _ in range(2):  # two layers share a plan
        out = torch.full_like(case.q, torch.nan)
        api.attend(case.q, case.index_q, case.caches, case.batch, Selection(16), case.scale, out)
        assert out.isfinite().all()


def test_a_layer():
    with torch.device("cuda"):
        launches.small()
    torch.cuda.synchronize()
