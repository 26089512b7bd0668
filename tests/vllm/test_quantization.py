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


def config(quantization: str | None, **section: Any) -> Any:
    hf_config = SimpleNamespace(quantization_config=section or None)
    return SimpleNamespace(model_config=SimpleNamespace(quantization=quantization, hf_config=hf_config))


@pytest.mark.parametrize(
    "given",
    [
        config("modelopt_mxfp8", quant_method="modelopt", quant_algo="MXFP8"),
        config("compressed-tensors", quant_method="compressed-tensors"),
        config("fp8", quant_method="fp8"),
        config("fp8"),
        config("mxfp8"),
    ],
    ids=["modelopt", "compressed", "fp8 by tensors", "fp8 while loading", "mxfp8 while loading"],
)
def test_untested_unless_the_user_wants_to_try(given: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MSA_ALLOW_UNTESTED", raising=False)
    with pytest.raises(MSAError) as refused:
        check_quantization(given)
    assert str(refused.value).startswith(
        f"quantization is {given.model_config.quantization}, but msa-backend is tested with unquantized weights, mxfp8 "
        "and fp8 by blocks of 128 x 128 only; set MSA_ALLOW_UNTESTED=1"
    )
    monkeypatch.setenv("MSA_ALLOW_UNTESTED", "1")
    check_quantization(given)


def test_what_was_run_passes():
    check_quantization(config(None))
    check_quantization(config("mxfp8", quant_method="mxfp8"))
    check_quantization(config("fp8", quant_method="fp8", weight_block_size=[128, 128]))
