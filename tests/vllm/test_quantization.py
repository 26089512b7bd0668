"""Where quantized weights are refused on a GPU, as far as the start-up check sees one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from msa_backend.config import MSAError
from msa_backend.vllm.quantization import check_quantization


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.platforms.current_platform", SimpleNamespace(is_cpu=lambda: False))


def config(quantization: str | None, cache_dtype: str = "auto", **section: Any) -> Any:
    hf_config = SimpleNamespace(quantization_config={"quant_method": quantization} | section)
    model = SimpleNamespace(quantization=quantization, dtype=torch.bfloat16, hf_config=hf_config)
    return SimpleNamespace(model_config=model, cache_config=SimpleNamespace(cache_dtype=cache_dtype))


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


def test_a_cache_that_only_the_checkpoint_asks_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MSA_ALLOW_UNTESTED", "1")
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    with pytest.raises(MSAError, match="kv_cache_scheme .* asks for a quantized cache, .* --kv-cache-dtype bfloat16"):
        check_quantization(config("compressed-tensors", kv_cache_scheme=scheme))
    check_quantization(config("compressed-tensors", "bfloat16", kv_cache_scheme=scheme))
