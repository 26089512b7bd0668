"""What MSA cannot serve is refused by vLLM's own option parsing, in one sentence, before any process is started."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from msa_backend.config import MSAError

from ..damage import BAD_CONFIGS, LACKS_LAYER_4, add_a_layer, remove_weights, truncate_a_shard


def start(model: Path, **options: Any) -> Any:
    """Everything ``vllm serve`` does with its options before it starts a process."""
    from vllm.engine.arg_utils import EngineArgs

    defaults = {"attention_backend": "msa", "max_model_len": 4096, "kv_cache_memory_bytes": 2**28}
    return EngineArgs(model=str(model), **(defaults | options)).create_engine_config()


def refusal(model: Path, **options: Any) -> str:
    with pytest.raises(MSAError) as refused:
        start(model, **options)
    message = str(refused.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("selected", ["msa", None])
def test_served_with_and_without_the_flag(tiny: Path, selected: str | None):
    """Installed means used: the flag only names what an M3 model gets anyway, and never reaches the dense layers."""
    from vllm.model_executor.models import ModelRegistry

    config = start(tiny, attention_backend=selected)
    assert config.attention_config.backend is None
    assert config.cache_config.block_size == 128
    model_class, _ = ModelRegistry.resolve_model_cls(config.model_config.architectures, config.model_config)
    assert model_class.__module__ == "msa_backend.model.vllm.causal_lm"


def test_text_only_checkpoint_of_transformers(tiny: Path, tmp_path: Path):
    """``MiniMaxM3VLForCausalLM``, saved from the text half of ``tiny``, whose names and config are its own."""
    from transformers import MiniMaxM3VLForCausalLM

    from .. import oracle

    MiniMaxM3VLForCausalLM(oracle.load(tiny).config.text_config).save_pretrained(tmp_path)
    assert start(tmp_path, skip_tokenizer_init=True).model_config.architectures == ["MiniMaxM3VLForCausalLM"]


def test_another_backend_is_left_to_the_dense_layers(tiny: Path):
    assert start(tiny, attention_backend="CPU_ATTN").attention_config.backend.name == "CPU_ATTN"


def test_overrides_reach_the_model(tiny: Path):
    from msa_backend.vllm.model_config import recorded

    changed = {"text_config": {"sparse_attention_config": {"sparse_topk_blocks": 3}}}
    assert recorded(start(tiny, hf_overrides=changed)).msa.topk == 3
    assert recorded(start(tiny)).msa.topk != 3


def test_another_model(llama: Path):
    message = refusal(llama, skip_tokenizer_init=True)
    assert "LlamaForCausalLM, which has no MSA layers" in message


def test_another_model_without_the_flag_is_left_alone(llama: Path):
    assert start(llama, attention_backend=None, skip_tokenizer_init=True).attention_config.backend is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"block_size": 64}, ["--block-size is 64", "128"]),
        ({"block_size": 256}, ["--block-size is 256", "128"]),
        ({"kv_cache_dtype": "fp8"}, ["--kv-cache-dtype is fp8", "auto or bfloat16"]),
        ({"kv_cache_dtype": "float16", "dtype": "bfloat16"}, ["--kv-cache-dtype is float16", "auto or bfloat16"]),
        ({"attention_backend": None, "attention_config": {"backend": "msa", "indexer_kv_dtype": "fp8"}},
         ["indexer_kv_dtype is fp8", "'auto'"]),
        ({"tensor_parallel_size": 3}, ["--tensor-parallel-size is 3", "2 KV heads"]),
        ({"tensor_parallel_size": 2, "decode_context_parallel_size": 2}, ["decode_context_parallel_size is 2"]),
        ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, ["--kv-transfer-config"]),
        ({"enable_lora": True}, ["--enable-lora"]),
        ({"quantization": "fp8"}, ["quantization is fp8", "unquantized"]),
        ({"hf_overrides": {"text_config": {"swiglu_limit": 5.0}}}, ["1.702 and 5.0", "1.702 and 7.0"]),
        ({"hf_overrides": lambda config: config}, ["hf_overrides is a function", "dict"]),
    ],
)  # fmt: skip
def test_options_msa_cannot_serve(tiny: Path, options: dict[str, Any], says: list[str]):
    message = refusal(tiny, **options)
    for words in says:
        assert words in message


def test_mtp(edited: Callable[..., Path]):
    folder = edited(lambda text: text.update(num_mtp_modules=1))
    message = refusal(folder, speculative_config={"method": "mtp", "num_speculative_tokens": 2})
    assert "speculative method mtp" in message
    assert "ngram" in message


@pytest.mark.parametrize(
    ("change", "says"),
    [*BAD_CONFIGS, (lambda text: text.update(num_hidden_layers=5), "num_hidden_layers is 5")],
)
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
