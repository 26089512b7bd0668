"""What of vLLM's own options and of its CPU's kernels MSA cannot serve; what every engine has is in tests/engines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ..engines.drivers import DRIVER
from ..refusal import sentence


def refusal(model: Path, **own: Any) -> str:
    return sentence(DRIVER.parse, model, dtype="bfloat16", own=own)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kv_cache_dtype": "float16"}, ["--kv-cache-dtype is float16", "auto, bfloat16, fp8", "pass bfloat16"]),
        ({"kv_cache_dtype": "int8_per_token_head"}, ["--kv-cache-dtype is int8_per_token_head", "in fp8"]),
        ({"attention_config": {"indexer_kv_dtype": "mxfp4"}}, ["indexer_kv_dtype is mxfp4", "auto, bf16, fp8"]),
        (
            {"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["0", "2"]},
            ["--kv-cache-dtype-skip-layers is 0 2", "all layers in one dtype"],
        ),
        ({"hf_overrides": {"text_config": {"swiglu_limit": 5.0}}}, ["1.702 and 5.0", "1.702 and 7.0"]),
        ({"hf_overrides": lambda config: config}, ["hf_overrides is a function", "dict"]),
    ],
)
def test_options_msa_cannot_serve(tiny: Path, options: dict[str, Any], says: list[str]):
    message = refusal(tiny, **options)
    for words in says:
        assert words in message


def test_a_longer_context_than_the_config_allows(tiny: Path):
    """As docs/deployment.md says for 1M tokens."""
    length = 262_144
    with pytest.raises(ValueError, match="max_position_embeddings"):
        DRIVER.parse(tiny, context=length)
    assert DRIVER.parse(tiny, context=length, overrides={"max_position_embeddings": length}).topk == 4


def test_a_list_of_another_length_than_the_layers(edited: Callable[..., Path]):
    """SGLang does not get this far: it asks `transformers` first, which refuses."""
    assert "num_hidden_layers is 5" in refusal(edited(lambda text: text.update(num_hidden_layers=5)))


def test_sleep_mode_is_not_tested(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    """On a CPU vLLM refuses it first."""
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_sleep_mode_available", lambda self: True)
    assert "--enable-sleep-mode is set, but msa-backend is tested with" in refusal(tiny, enable_sleep_mode=True)
