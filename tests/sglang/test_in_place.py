"""SGLang logs what fails in a plugin and serves on with its in-tree attention; each way to get there stops instead."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from msa_backend.config import MSAError

from ..engines.drivers import DRIVER
from .test_startup import refusal, start

NOT_TAKEN = "SGLang did not take msa-backend's plugin in this process .*MSA_DISABLE=1"


@pytest.fixture(scope="module", autouse=True)
def loaded():
    DRIVER.prepare()


@pytest.fixture
def hook_undone(monkeypatch: pytest.MonkeyPatch):
    """As when SGLang failed to apply the hook, or another plugin replaced the function afterwards."""
    from sglang.srt.layers.attention import attention_registry
    from sglang.srt.model_executor.model_runner_components import attention_backend_setup

    original = attention_registry.attn_backend_wrapper.__wrapped__
    for module in (attention_registry, attention_backend_setup):
        monkeypatch.setattr(module, "attn_backend_wrapper", original)


@pytest.mark.usefixtures("hook_undone")
def test_start_up_sees_that_the_hook_did_not_take(tiny: Path):
    with pytest.raises(MSAError, match=NOT_TAKEN):
        start(tiny)


@pytest.mark.usefixtures("hook_undone")
def test_the_scheduler_sees_that_the_hook_did_not_take():
    """Both that it asks for our backend and that it asks for another one, with our model."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    from msa_backend.model.sglang.entry.minimax_m3 import MiniMaxM3SparseForCausalLM

    with pytest.raises(MSAError, match=NOT_TAKEN):
        ATTENTION_BACKENDS["msa"](SimpleNamespace())
    with pytest.raises(MSAError, match=NOT_TAKEN):
        MiniMaxM3SparseForCausalLM(SimpleNamespace())


def test_a_process_that_skipped_the_plugin():
    """The variable that brings our model class is inherited; SGLANG_PLUGINS may still leave the plugin out."""
    code = """
from types import SimpleNamespace
from sglang.srt.plugins import load_plugins
from sglang.srt.models.registry import ModelRegistry
load_plugins()
ModelRegistry.models["MiniMaxM3SparseForCausalLM"](SimpleNamespace())
"""
    package = "msa_backend.model.sglang.entry"
    with pytest.raises(RuntimeError) as ended:
        DRIVER.run(code, SGLANG_PLUGINS="another", SGLANG_EXTERNAL_MODEL_PACKAGE=package)
    last = str(ended.value).strip().splitlines()[-1]
    assert "MSAError: SGLang did not take msa-backend's plugin in this process" in last
    assert "SGLANG_PLUGINS" in last


def test_the_in_tree_class(tiny: Path):
    """What SGLang takes when the import of ours fails, with a line in its log."""
    from msa_backend.sglang.backend import _check_model

    config = SimpleNamespace(architectures=["MiniMaxM3SparseForConditionalGeneration"])
    runner = SimpleNamespace(model=object(), model_config=SimpleNamespace(hf_config=config, model_path="m"))
    with pytest.raises(MSAError, match=r"SGLang took builtins\.object for this model and not msa-backend's"):
        _check_model(runner)
    config.architectures = ["LlamaForCausalLM"]
    with pytest.raises(MSAError, match="m is LlamaForCausalLM, which has no MSA layers"):
        _check_model(runner)


def test_what_is_wrapped_and_what_is_left_alone():
    """Whatever backend was selected: MiniMax-M3's sparse layers are never SGLang's, other models always are."""
    from msa_backend.sglang import backend

    def runner(architecture: str) -> Any:
        config = SimpleNamespace(architectures=[architecture])
        return SimpleNamespace(model=object(), model_config=SimpleNamespace(hf_config=config, model_path="m"))

    def wrap(original: Any, architecture: str, selected: Any) -> Any:
        return backend.wrap(original, runner(architecture), selected)

    in_tree = object()
    assert wrap(lambda *_: in_tree, "LlamaForCausalLM", object()) is in_tree
    with pytest.raises(MSAError, match=r"SGLang took builtins\.object"):
        wrap(lambda *_: in_tree, "MiniMaxM3SparseForCausalLM", object())
    ours = object.__new__(backend.MSAAttnBackend)
    assert wrap(lambda *_: in_tree, "MiniMaxM3SparseForCausalLM", ours) is ours


def test_another_model_package(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SGLANG_EXTERNAL_MODEL_PACKAGE", "my.models")
    message = refusal(tiny)
    assert "SGLANG_EXTERNAL_MODEL_PACKAGE is my.models" in message
    assert "unset it" in message


def test_a_cpu_that_sglang_was_not_told_of(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE")
    assert "only with SGLANG_USE_CPU_ENGINE=1 in the environment" in refusal(tiny)


def test_a_cache_that_does_not_hold_the_index_keys(tiny: Path):
    says = "--enable-hierarchical-cache is set, but msa-backend"
    assert says in refusal(tiny, enable_hierarchical_cache=True)


def test_a_text_only_checkpoint_gets_the_caches_of_minimax_m3(text_only: Path):
    """SGLang knows them by the architecture's name; the forms of ``transformers`` have another."""
    options = start(text_only, skip_tokenizer_init=True)
    given = json.loads(options.json_model_override_args)
    assert given["sparse_attention_config"]["sparse_attention_freq"] == [0, 1, 1, 1]
    from sglang.srt.configs.model_config import ModelConfig, is_minimax_sparse

    config = ModelConfig.from_server_args(options._server_args)
    assert is_minimax_sparse(config.hf_config)
    assert config.num_attention_layers == 4
