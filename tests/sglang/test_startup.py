"""What of SGLang's own options MSA cannot serve; what every engine has is in tests/engines."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from msa_backend.config import MSAError

from ..engines.drivers import DRIVER
from ..engines.drivers.sglang import resolved
from ..refusal import sentence


@pytest.fixture(scope="module", autouse=True)
def loaded():
    DRIVER.prepare()


def start(model: Path, **options: Any) -> Any:
    """Everything the server does with its options before it starts a process."""
    return resolved(model, {"attention_backend": "msa", "device": "cpu", "max_total_tokens": 8192} | options)


def refusal(model: Path, **options: Any) -> str:
    return sentence(start, model, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"attention_backend": None, "prefill_attention_backend": "msa", "decode_attention_backend": "torch_native"},
        {"decode_attention_backend": "torch_native"},
    ],
)
def test_prefill_and_decode_are_not_parted(tiny: Path, options: dict[str, Any]):
    message = refusal(tiny, **options)
    assert "MSA serves prefill and decode alike" in message
    assert "torch_native" in message


def test_a_gpu_is_refused_until_it_is_tested(monkeypatch: pytest.MonkeyPatch):
    from msa_backend.sglang import startup

    options = SimpleNamespace(device="cuda", page_size=None, disaggregation_mode="null", speculative_algorithm=None)
    with pytest.raises(MSAError, match="--device is cuda, but .* SGLang on a CPU only; set MSA_ALLOW_UNTESTED=1"):
        startup._check_options(options, options)
    monkeypatch.setenv("MSA_ALLOW_UNTESTED", "1")
    startup._check_options(options, options)


def test_quantized_weights_on_a_gpu_are_refused_until_they_are_tested(monkeypatch: pytest.MonkeyPatch):
    from msa_backend.sglang import startup

    options = SimpleNamespace(device="cuda", quantization=None)
    quantized = SimpleNamespace(quantization_config={"quant_method": "fp8"})
    with pytest.raises(MSAError, match="quantization is fp8, but .* unquantized weights only; set MSA_ALLOW_UNTESTED"):
        startup._check_quantization(options, quantized)
    startup._check_quantization(options, SimpleNamespace())
    monkeypatch.setenv("MSA_ALLOW_UNTESTED", "1")
    startup._check_quantization(options, quantized)
