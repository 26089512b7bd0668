"""On a GPU what was run by itself is served by itself, and two such things together are refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from msa_backend.config import MSAError
from msa_backend.vllm.together import check_together

ALONE = {
    "quantization is mxfp8": {"quantization": "mxfp8"},
    "--kv-cache-dtype is fp8": {"kv": "fp8", "index": "fp8"},
    "indexer_kv_dtype is fp8": {"index": "fp8"},
    "speculative method is eagle3": {"drafts": "eagle3"},
    "--tensor-parallel-size is 2": {"ranks": 2},
}


def config(
    quantization: str | None = None, kv: str = "auto", index: str = "auto", drafts: str | None = None, ranks: int = 1
) -> Any:
    return SimpleNamespace(
        model_config=SimpleNamespace(quantization=quantization, dtype=torch.bfloat16),
        cache_config=SimpleNamespace(cache_dtype=kv),
        attention_config=SimpleNamespace(indexer_kv_dtype=index),
        speculative_config=drafts and SimpleNamespace(method=drafts),
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
    )


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.platforms.current_platform", SimpleNamespace(is_cpu=lambda: False))
    monkeypatch.delenv("MSA_ALLOW_UNTESTED", raising=False)


@pytest.mark.parametrize("given", ALONE.values(), ids=ALONE)
def test_alone(given: dict[str, Any]):
    check_together(config())
    check_together(config(**given))


PAIRS = [(a, b) for i, a in enumerate(ALONE) for b in list(ALONE)[i + 1 :] if not {a, b} <= set(list(ALONE)[1:3])]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_two_at_once(one: str, other: str, monkeypatch: pytest.MonkeyPatch):
    given = config(**ALONE[one] | ALONE[other])
    with pytest.raises(MSAError) as refused:
        check_together(given)
    assert str(refused.value).startswith(
        f"{one} and {other} on a GPU, but msa-backend is tested with one of these at a time there only"
    )
    with monkeypatch.context() as allowed:
        allowed.setenv("MSA_ALLOW_UNTESTED", "1")
        check_together(given)
    monkeypatch.setattr("vllm.platforms.current_platform", SimpleNamespace(is_cpu=lambda: True))
    check_together(given)
