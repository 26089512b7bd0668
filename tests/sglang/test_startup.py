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


def on_a_gpu(kv_cache_dtype: str = "auto", **graphs: str) -> Any:
    """Options as SGLang has resolved them by the time it asks."""
    given = {"decode": "full", "prefill": "breakable"} | graphs
    return SimpleNamespace(
        device="cuda", page_size=None, disaggregation_mode="null", speculative_algorithm=None,
        kv_cache_dtype=kv_cache_dtype,
        cuda_graph_config=SimpleNamespace(**{phase: SimpleNamespace(backend=name) for phase, name in given.items()}),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (on_a_gpu(prefill="full"), "--cuda-graph-backend-prefill is full, but .* pass breakable or disabled"),
        (on_a_gpu(decode="breakable"), "--cuda-graph-backend-decode is breakable, but .* pass full or disabled"),
        (on_a_gpu("fp8_e5m2"), "--kv-cache-dtype is fp8_e5m2, but .* takes fp8 as e4m3 alone; pass fp8_e4m3"),
        (on_a_gpu("fp4_e2m1"), "--kv-cache-dtype is fp4_e2m1, but .* takes fp8 as e4m3 alone; pass fp8_e4m3"),
    ],
)
def test_what_a_gpu_is_not_to_do(monkeypatch: pytest.MonkeyPatch, options: Any, message: str):
    from msa_backend.sglang import startup

    monkeypatch.setenv("MSA_ALLOW_UNTESTED", "1")
    with pytest.raises(MSAError, match=message):
        startup._check_options(options, options)


def test_fp8_caches_on_a_gpu_are_refused_until_they_are_tested(monkeypatch: pytest.MonkeyPatch):
    from msa_backend.sglang import startup

    options = on_a_gpu("fp8_e4m3")
    with pytest.raises(MSAError, match="--kv-cache-dtype is fp8_e4m3, but .* caches in auto or bf16 or bfloat16 only"):
        startup._check_quantized_cache(options)
    monkeypatch.setenv("MSA_ALLOW_UNTESTED", "1")
    startup._check_options(options, options)


def test_graphs_are_known_however_they_were_asked_for(tiny: Path):
    """SGLang has resolved its several options for them before it asks the model's start-up."""
    assert "--cuda-graph-backend-prefill is full" in refusal(tiny, cuda_graph_backend_prefill="full")
    assert "--cuda-graph-backend-prefill is full" in refusal(tiny, cuda_graph_config={"prefill": {"backend": "full"}})
    assert "--cuda-graph-backend-decode is breakable" in refusal(tiny, cuda_graph_backend_decode="breakable")


def test_a_gpu_is_refused_until_it_is_tested(monkeypatch: pytest.MonkeyPatch):
    from msa_backend.sglang import startup

    options = on_a_gpu()
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
