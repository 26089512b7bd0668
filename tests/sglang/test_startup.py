"""What MSA cannot serve is refused by SGLang's own option parsing, in one sentence, before any process is started.

The same inputs as in tests/vllm, where the engines have the same; the sentences are the same, but for the names of
options.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from msa_backend.config import MSAError

from ..damage import BAD_CONFIGS, LACKS_LAYER_4, add_a_layer, remove_weights, truncate_a_shard
from .engines import ENVIRONMENT


@pytest.fixture(scope="module", autouse=True)
def loaded():
    os.environ.update(ENVIRONMENT)
    from sglang.srt.plugins import load_plugins

    load_plugins()


def start(model: Path, **options: Any) -> Any:
    """Everything the server does with its options before it starts a process."""
    from sglang.srt.arg_groups.model_override_base import resolving_view
    from sglang.srt.server_args import ServerArgs

    defaults = {"attention_backend": "msa", "device": "cpu", "max_total_tokens": 8192}
    server_args = ServerArgs(model_path=str(model), **(defaults | options))
    server_args.resolve_once()
    return resolving_view(server_args)


def refusal(model: Path, **options: Any) -> str:
    with pytest.raises(MSAError) as refused:
        start(model, **options)
    message = str(refused.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("selected", ["msa", None])
def test_served_with_and_without_the_flag(tiny: Path, selected: str | None):
    """Installed means used: without the flag an M3 model gets the backend all the same."""
    options = start(tiny, attention_backend=selected)
    assert options.attention_backend == "msa"
    assert options.page_size == 128


def overrides(tiny: Path, change: Callable[[dict[str, Any]], None]) -> str:
    """A change of the text section as SGLang takes one: with the whole section, since it replaces sections."""
    text = json.loads((tiny / "config.json").read_text())["text_config"]
    change(text)
    return json.dumps({"text_config": text})


def test_overrides_reach_the_model(tiny: Path):
    changed = overrides(tiny, lambda text: text["sparse_attention_config"].update(sparse_topk_blocks=3))
    given = json.loads(start(tiny, json_model_override_args=changed).json_model_override_args)
    assert given["text_config"]["sparse_attention_config"]["sparse_topk_blocks"] == 3


def test_overrides_that_msa_cannot_serve(tiny: Path):
    changed = overrides(tiny, lambda text: text["sparse_attention_config"].update(sparse_topk_blocks=99))
    assert "top-k is 99 blocks, but MSA supports 1 to 32" in refusal(tiny, json_model_override_args=changed)


def test_another_model(llama: Path):
    assert "LlamaForCausalLM, which has no MSA layers" in refusal(llama, skip_tokenizer_init=True)


def test_another_model_without_the_flag_is_left_alone(llama: Path):
    options = start(llama, attention_backend="torch_native", skip_tokenizer_init=True)
    assert options.attention_backend == "torch_native"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"page_size": 64}, ["--page-size is 64, but MSA needs 128, one page a sparse block"]),
        ({"page_size": 256}, ["--page-size is 256", "128"]),
        ({"tp_size": 3}, ["--tp-size is 3", "2 KV heads"]),
        ({"attention_backend": None, "prefill_attention_backend": "msa", "decode_attention_backend": "torch_native"},
         ["MSA serves prefill and decode alike", "torch_native"]),
        ({"decode_attention_backend": "torch_native"}, ["MSA serves prefill and decode alike", "torch_native"]),
        ({"enable_lora": True, "max_lora_rank": 8, "lora_target_modules": ["q_proj"]}, ["--enable-lora"]),
        ({"disaggregation_mode": "prefill"}, ["--disaggregation-mode is prefill"]),
    ],
)  # fmt: skip
def test_options_msa_cannot_serve(tiny: Path, options: dict[str, Any], says: list[str]):
    message = refusal(tiny, **options)
    for words in says:
        assert words in message


def test_a_gpu_is_refused_until_it_is_tested(monkeypatch: pytest.MonkeyPatch):
    from msa_backend.sglang import startup

    options = SimpleNamespace(device="cuda", page_size=None, disaggregation_mode="null", speculative_algorithm=None)
    with pytest.raises(MSAError, match="--device is cuda, but .* SGLang on a CPU only; set MSA_ALLOW_UNTESTED=1"):
        startup._check_options(options, options)
    monkeypatch.setenv("MSA_ALLOW_UNTESTED", "1")
    startup._check_options(options, options)


# A list of another length than num_hidden_layers is refused by `transformers`, which SGLang asks first.
@pytest.mark.parametrize(("change", "says"), BAD_CONFIGS)
def test_configs_msa_cannot_serve(edited: Callable[..., Path], change: Callable[[dict[str, Any]], None], says: str):
    assert says in refusal(edited(change))


def test_a_truncated_shard(edited: Callable[..., Path]):
    folder = edited(lambda text: None)
    says = truncate_a_shard(folder)
    assert says in refusal(folder)


def test_a_layer_more_than_the_checkpoint_has(edited: Callable[..., Path]):
    assert LACKS_LAYER_4 in refusal(edited(add_a_layer))


def test_dummy_weights_need_no_files(edited: Callable[..., Path]):
    folder = edited(lambda text: None)
    remove_weights(folder)
    assert start(folder, load_format="dummy") is not None
