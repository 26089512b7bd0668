"""Drafts that cannot be served are refused before a process is started, in one sentence each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from msa_backend.config import MSAError
from msa_backend.refusals import ALLOW_UNTESTED
from msa_backend.tiny import TinyShape, write_tiny_checkpoint
from msa_backend.vllm import drafts

from ..engines.drivers import DRIVER
from ..refusal import sentence
from . import draft_models


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with an MTP module."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("drafts") / "mtp", shape=TinyShape(mtp_modules=1))


def parse(target: Path, *, own: dict[str, Any] | None = None, **speculative: Any) -> None:
    DRIVER.parse(target, own={"speculative_config": {"method": "mtp"} | speculative} | (own or {}))


def refusal(target: Path, **given: Any) -> str:
    return sentence(parse, target, **given)


@pytest.mark.parametrize("number", [1, 7])
def test_served(model: Path, number: int):
    parse(model, num_speculative_tokens=number)


def test_a_method_that_no_test_runs(model: Path, monkeypatch: pytest.MonkeyPatch):
    given = {"method": "ngram_gpu", "num_speculative_tokens": 2}
    assert "speculative method is ngram_gpu, but msa-backend is tested with ngram, eagle3 and mtp" in refusal(
        model, **given
    )
    monkeypatch.setenv(ALLOW_UNTESTED, "1")
    parse(model, **given)


@pytest.mark.parametrize("method", ["mtp", "eagle3", "minimax_m3_mtp"])
def test_no_number_of_tokens(model: Path, method: str):
    assert "without num_speculative_tokens" in refusal(model, method=method, model=str(model))


def test_the_flags_are_read_too(model: Path):
    with pytest.raises(MSAError, match="without num_speculative_tokens"):
        DRIVER.parse(model, own={"spec_method": "mtp"})
    DRIVER.parse(model, own={"spec_method": "mtp", "spec_tokens": 2})


def test_no_modules(tiny: Path):
    assert "num_mtp_modules is 0 in config.json" in refusal(tiny, num_speculative_tokens=2)


def test_modules_that_the_checkpoint_does_not_hold(edited: Callable[..., Path]):
    """As `transformers` saves them: it drops the weights and keeps the number."""
    folder = edited(lambda text: text.update(num_mtp_modules=1))
    message = refusal(folder, num_speculative_tokens=2)
    assert "promises num_mtp_modules=1, but the checkpoint holds no mtp.* weights" in message
    DRIVER.parse(folder, dummy_weights=True, own=mtp(2))
    DRIVER.parse(folder, drafts=2)


def mtp(number: int) -> dict[str, Any]:
    return {"speculative_config": {"method": "mtp", "num_speculative_tokens": number}}


def test_a_text_only_checkpoint(text_only: Path):
    """vLLM looks for modules in the whole model alone."""
    with pytest.raises(MSAError, match="in MiniMaxM3SparseForConditionalGeneration alone"):
        DRIVER.parse(text_only, tokenizer=False, own=mtp(2))


@pytest.mark.parametrize(
    ("tensor", "says"),
    [("eh_proj.weight", "eh_proj.weight has the shape [512, 256]"), (None, "lacks .*mtp.layers.0.enorm.weight")],
)
def test_weights_of_another_model(tmp_path: Path, tensor: str | None, says: str):
    def damage(weights: draft_models.Weights) -> None:
        if tensor is None:
            del weights[f"{draft_models.MODULE}.enorm.weight"]
        else:
            name = f"{draft_models.MODULE}.{tensor}"
            weights[name] = weights[name].T.contiguous()

    folder = write_tiny_checkpoint(tmp_path / "damaged", shape=TinyShape(mtp_modules=1))
    message = refusal(draft_models.rewrite(folder, damage), num_speculative_tokens=1)
    assert all(words in message for words in says.split(".*"))


def test_more_modules_than_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """vLLM asks for whole rounds through them, though it runs the first alone, and this is said."""
    folder = write_tiny_checkpoint(tmp_path / "two", shape=TinyShape(mtp_modules=2))
    assert "num_speculative_tokens is 3, but with num_mtp_modules=2" in refusal(folder, num_speculative_tokens=3)
    said: list[str] = []
    monkeypatch.setattr(drafts.logger, "warning", lambda text, *values: said.append(text % values))
    parse(folder, num_speculative_tokens=2)
    (sentence,) = said
    assert sentence.startswith("The first of the 2 MTP modules drafts every token and the others stay idle")


def test_a_folder_of_modules_alone(model: Path, tmp_path: Path):
    """vLLM takes a draft from a folder of its own, with a flat config."""
    text = json.loads((model / "config.json").read_text())["text_config"]
    (tmp_path / "config.json").write_text(json.dumps(text | {"model_type": "minimax_m3_mtp", "num_mtp_modules": 0}))
    assert "num_mtp_modules is 0" in refusal(model, model=str(tmp_path), num_speculative_tokens=2)


def test_other_caches_than_the_target(model: Path):
    message = refusal(model, num_speculative_tokens=2, kv_cache_dtype="fp8")
    assert "kv_cache_dtype in --speculative-config is fp8" in message


def test_pipeline_parallelism(model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(ALLOW_UNTESTED, "1")
    message = refusal(model, num_speculative_tokens=2, own={"pipeline_parallel_size": 2})
    assert "speculative method is mtp with --pipeline-parallel-size 2" in message


@pytest.mark.parametrize(
    ("taps", "says"),
    [
        (None, "before layers [2, 2, 1] by default"),
        ([1, 1, 3], "[1, 1, 3], but the model has 4"),
        ([0, 2, 5], "0 to 4"),
    ],
)
def test_taps_that_the_target_does_not_have(tiny: Path, tmp_path: Path, taps: list[int] | None, says: str):
    draft = draft_models.write_eagle3_draft(tmp_path / "draft", tiny, taps)
    assert says in refusal(tiny, method="eagle3", model=str(draft), num_speculative_tokens=3)


@pytest.mark.parametrize("change", [{}, {"eagle_config": {"use_aux_hidden_state": False}}])
def test_taps_that_it_has(tiny: Path, tmp_path: Path, change: dict[str, Any]):
    draft = draft_models.write_eagle3_draft(tmp_path / "draft", tiny, [0, 2, 4])
    config = json.loads((draft / "config.json").read_text())
    (draft / "config.json").write_text(json.dumps(config | change))
    parse(tiny, method="eagle3", model=str(draft), num_speculative_tokens=3)


def gpu(method: str, monkeypatch: pytest.MonkeyPatch, eager: bool = False) -> SimpleNamespace:
    """vLLM's reading of the options on a GPU, as far as it gets."""
    monkeypatch.setattr("vllm.platforms._current_platform", SimpleNamespace(is_cpu=lambda: False, device_type="cuda"))
    monkeypatch.delenv(ALLOW_UNTESTED, raising=False)
    return SimpleNamespace(
        model_config=SimpleNamespace(enforce_eager=eager),
        speculative_config=SimpleNamespace(method=method),
        parallel_config=SimpleNamespace(pipeline_parallel_size=2),
    )


@pytest.mark.parametrize("method", ["mtp", "eagle3"])
def test_graphs_on_a_gpu_are_not_tested(method: str, monkeypatch: pytest.MonkeyPatch):
    given = rf"speculative method is {method} with CUDA graphs, but .* drafts under --enforce-eager on a GPU, or n-gram"
    with pytest.raises(MSAError, match=given):
        drafts.check(gpu(method, monkeypatch), None)
    with pytest.raises(MSAError, match="one stage only"):  # what is asked next
        drafts.check(gpu(method, monkeypatch, eager=True), None)
    config = gpu(method, monkeypatch)
    monkeypatch.setenv(ALLOW_UNTESTED, "1")
    with pytest.raises(MSAError, match="one stage only"):
        drafts.check(config, None)


def test_ngram_stays_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    drafts.check(gpu("ngram", monkeypatch), None)
