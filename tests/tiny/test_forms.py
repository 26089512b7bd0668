"""All forms are one model, `transformers` loads each without a complaint, and the same seed gives the same bytes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from msa_backend.config import MSAConfig
from msa_backend.tiny import FORMS, TinyShape, write_tiny_checkpoint
from tests import oracle

PROMPT = oracle.random_prompt(700)


def text_config(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())["text_config"]


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.mark.parametrize("form", [form for form in FORMS if form != "original"])
def test_forms_are_the_same_model(form: str, original: Path, model: Any, tmp_path: Path) -> None:
    other = write_tiny_checkpoint(tmp_path / "other", form=form)
    assert torch.equal(oracle.prompt_logprobs(oracle.load(other), PROMPT), oracle.prompt_logprobs(model, PROMPT))
    assert MSAConfig.from_text_config(text_config(other)) == MSAConfig.from_text_config(text_config(original))


def test_forms_have_their_own_names(original: Path, tmp_path: Path) -> None:
    def names(directory: Path) -> set[str]:
        return set(load_file(directory / "model.safetensors"))

    native = names(write_tiny_checkpoint(tmp_path / "native", form="transformers"))
    default = names(write_tiny_checkpoint(tmp_path / "default", form="transformers-default"))
    assert "language_model.model.layers.0.mlp.gate_proj.weight" in names(original)
    assert "language_model.model.layers.1.block_sparse_moe.experts.7.w2.weight" in names(original)
    assert "model.language_model.layers.1.mlp.experts.down_proj" in native
    # The reverse mapping of transformers renames dense and vision MLPs too.
    assert "language_model.model.layers.0.block_sparse_moe.gate_proj.weight" in default
    assert "vision_tower.vision_model.encoder.layers.0.block_sparse_moe.fc1.weight" in default


def test_only_the_original_config_is_nested(original: Path, tmp_path: Path) -> None:
    flat = text_config(write_tiny_checkpoint(tmp_path / "flat", form="transformers"))
    assert "index_topk_blocks" in flat and "sparse_attention_config" not in flat and "n_shared_experts" not in flat
    nested = text_config(original)
    assert "sparse_attention_config" in nested and "layer_types" not in nested


@pytest.mark.parametrize("form", FORMS)
def test_shards_change_nothing(form: str, model: Any, tmp_path: Path) -> None:
    directory = write_tiny_checkpoint(tmp_path / "sharded", form=form, shards=3)
    assert len(list(directory.glob("model-*-of-00003.safetensors"))) == 3
    assert torch.equal(oracle.logprobs(oracle.load(directory), PROMPT), oracle.logprobs(model, PROMPT))


@pytest.mark.parametrize("form", FORMS)
def test_bf16_is_the_rounded_model(form: str, tmp_path: Path) -> None:
    directory = write_tiny_checkpoint(tmp_path / "bf16", form=form, dtype="bfloat16")
    if form == "original":
        with safe_open(directory / "model.safetensors", "pt") as file:
            # A safetensors file is no dict: it has keys, but does not iterate over them.
            fp32 = {name for name in file.keys() if file.get_tensor(name).dtype == torch.float32}  # noqa: SIM118
        layers = [f"language_model.model.layers.{layer}.block_sparse_moe" for layer in (1, 2, 3)]
        assert fp32 == {f"{layer}.{name}" for layer in layers for name in ("gate.weight", "e_score_correction_bias")}
    rounded = oracle.prompt_logprobs(oracle.load(directory, torch.bfloat16), PROMPT)
    exact = oracle.prompt_logprobs(oracle.load(directory), PROMPT)
    # Here and there bf16 rounding turns a choice of experts or blocks, so only the bulk can be close.
    assert (rounded - exact).abs().median() < 0.05


def test_bf16_forms_agree_when_read_in_fp32(tmp_path: Path) -> None:
    found = [
        oracle.logprobs(oracle.load(write_tiny_checkpoint(tmp_path / form, form=form, dtype="bfloat16")), PROMPT)
        for form in FORMS
    ]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_same_seed_same_bytes(original: Path, tmp_path: Path) -> None:
    again = write_tiny_checkpoint(tmp_path / "again")
    other = write_tiny_checkpoint(tmp_path / "other", seed=1)
    assert contents(again) == contents(original)
    ours, theirs = load_file(original / "model.safetensors"), load_file(other / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(not torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "original"])
def test_same_seed_same_bytes_through_transformers(form: str, tmp_path: Path) -> None:
    one, two = (write_tiny_checkpoint(tmp_path / name, form=form, shards=2) for name in ("one", "two"))
    assert contents(one) == contents(two)


def test_overwriting_leaves_no_stale_weights(tmp_path: Path) -> None:
    directory = write_tiny_checkpoint(tmp_path / "again", shards=3)
    write_tiny_checkpoint(directory, overwrite=True)
    assert [file.name for file in directory.glob("model*")] == ["model.safetensors"]
    oracle.load(directory)


def test_a_layer_may_mix_sparse_attention_and_a_dense_mlp(tmp_path: Path) -> None:
    shape = replace(TinyShape(), sparse_attention=(False, True, False, True), moe=(False, False, True, True))
    loaded = [
        oracle.load(write_tiny_checkpoint(tmp_path / form, form=form, shape=shape))
        for form in ("original", "transformers")
    ]
    assert torch.equal(*(oracle.logprobs(model, PROMPT) for model in loaded))
