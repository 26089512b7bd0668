"""Which dtypes of caches are refused where, as far as the start-up check sees of a device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from msa_backend.config import MSAError
from msa_backend.vllm.cache_dtypes import check_cache_dtypes, index_dtype, kv_dtype

E4M3 = torch.float8_e4m3fn


def config(kv: str = "auto", index: str = "auto", **section: Any) -> Any:
    hf_config = SimpleNamespace(quantization_config=section or None)
    return SimpleNamespace(
        model_config=SimpleNamespace(dtype=torch.bfloat16, hf_config=hf_config),
        cache_config=SimpleNamespace(cache_dtype=kv, kv_cache_dtype_skip_layers=[]),
        attention_config=SimpleNamespace(indexer_kv_dtype=index),
    )


def on(monkeypatch: pytest.MonkeyPatch, capability: int) -> None:
    """Pretend to be on a GPU; 0 for a CPU."""
    platform = SimpleNamespace(
        is_cpu=lambda: capability == 0,
        has_device_capability=lambda least: capability >= least,
        get_device_name=lambda: f"a card of SM{capability}",
    )
    monkeypatch.setattr("vllm.platforms.current_platform", platform)


@pytest.mark.parametrize("capability", [89, 90])
def test_served_on_a_gpu(capability: int, monkeypatch: pytest.MonkeyPatch):
    on(monkeypatch, capability)
    for given in (config("bfloat16", "bf16"), config("fp8"), config("fp8_e4m3", "fp8"), config(index="fp8")):
        check_cache_dtypes(given)


@pytest.mark.parametrize(
    ("kv", "capability", "says"),
    [
        ("fp8_e5m2", 90, "--kv-cache-dtype is fp8_e5m2, but no dense attention of vLLM takes it .*; pass fp8_e4m3"),
        ("fp8_e5m2", 80, "from SM89 up"),
        ("fp8_e4m3", 80, "takes fp8 in pages of 128 tokens from SM89 up, and this is a card of SM80; leave it out"),
    ],
)
def test_what_vllm_has_no_dense_attention_for(kv: str, capability: int, says: str, monkeypatch: pytest.MonkeyPatch):
    """Whatever the user allows."""
    on(monkeypatch, capability)
    monkeypatch.setenv("MSA_ALLOW_UNTESTED", "1")
    with pytest.raises(MSAError, match=says):
        check_cache_dtypes(config(kv))


def test_a_cpu_without_wide_vectors(monkeypatch: pytest.MonkeyPatch):
    on(monkeypatch, 0)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    monkeypatch.setattr("torch.cpu._is_avx512_supported", lambda: False)
    with pytest.raises(MSAError, match="fp8 with AVX-512 or AMX only, and this CPU has neither"):
        check_cache_dtypes(config("fp8"))
    check_cache_dtypes(config(index="fp8"))
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: True)
    check_cache_dtypes(config("fp8"))


def test_a_cache_that_only_the_checkpoint_asks_for(monkeypatch: pytest.MonkeyPatch):
    """vLLM would settle it in the first dense layer, where sparse layers before it no longer hear of it."""
    on(monkeypatch, 0)
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    asked = config(kv_cache_scheme=scheme)
    check_cache_dtypes(asked)
    assert asked.cache_config.cache_dtype == "fp8" and kv_dtype(asked) == E4M3
    overruled = config("bfloat16", kv_cache_scheme=scheme)
    check_cache_dtypes(overruled)
    assert kv_dtype(overruled) == torch.bfloat16
    for kv in ("auto", "fp8"):
        with pytest.raises(MSAError, match="kv_cache_scheme .* is 8 float attn_head, .* --kv-cache-dtype bfloat16"):
            check_cache_dtypes(config(kv, kv_cache_scheme=scheme | {"strategy": "attn_head"}))


def test_the_two_are_chosen_apart():
    both = [(kv_dtype(given), index_dtype(given)) for given in (config("fp8"), config(index="fp8"))]
    assert both == [(E4M3, torch.bfloat16), (torch.bfloat16, E4M3)]
    assert index_dtype(config("fp8_e5m2", "fp8")) == E4M3
