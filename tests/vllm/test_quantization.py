"""Where quantized weights are refused on a GPU, as far as the start-up check sees one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from msa_backend.config import MSAError
from msa_backend.vllm.quantization import check_quantization


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.platforms.current_platform", SimpleNamespace(is_cpu=lambda: False))


def config(quantization: str | None) -> Any:
    return SimpleNamespace(model_config=SimpleNamespace(quantization=quantization))


def test_untested_unless_the_user_wants_to_try(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(MSAError) as refused:
        check_quantization(config("modelopt_mxfp8"))
    assert str(refused.value).startswith(
        "quantization is modelopt_mxfp8, but msa-backend is tested with unquantized weights only; set "
        "MSA_ALLOW_UNTESTED=1"
    )
    monkeypatch.setenv("MSA_ALLOW_UNTESTED", "1")
    check_quantization(config("modelopt_mxfp8"))


def test_plain_weights_pass():
    check_quantization(config(None))
