"""The names and shapes of MTP modules, in the stream of a loader and in the headers of the files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from msa_backend.model.checkpoint import check_mtp_checkpoint
from msa_backend.model.config import M3Config
from msa_backend.model.mtp import expected_mtp_shapes, mtp_weights, num_modules
from msa_backend.model.weights import CheckpointError

from . import configs
from .test_weights import original_form

CONFIG = M3Config.from_text_config(configs.original())
PREFIX = "language_model.model.mtp.layers."
Weights = dict[str, torch.Tensor]


def with_modules(count: int) -> Weights:
    """A whole checkpoint, its text and ``count`` modules."""
    text = {name: tensor for name, tensor in original_form().items() if ".mtp." not in name}
    return text | {f"language_model.{name}": torch.zeros(s) for name, s in expected_mtp_shapes(CONFIG, count).items()}


@pytest.mark.parametrize("prefix", ["language_model.", ""])
def test_one_module_of_a_whole_checkpoint(prefix: str):
    weights = {name.replace("language_model.", prefix): tensor for name, tensor in with_modules(2).items()}
    found = {name: tuple(tensor.shape) for name, tensor in mtp_weights(weights.items(), CONFIG, 0)}
    assert found == expected_mtp_shapes(CONFIG, 1)


def test_a_module_is_a_sparse_layer_of_experts_between_two_inputs_and_a_norm():
    shapes = expected_mtp_shapes(CONFIG, 1)
    module = "model.mtp.layers.0"
    assert shapes[f"{module}.eh_proj.weight"] == (64, 128)
    assert f"{module}.transformer_layer.self_attn.index_q_proj.weight" in shapes
    assert f"{module}.transformer_layer.block_sparse_moe.experts.2.w2.weight" in shapes
    assert not any(".mlp." in name for name in shapes)


def test_a_config_that_does_not_say_has_one_module():
    assert [num_modules(config) for config in ({}, {"num_mtp_modules": 3}, {"num_mtp_modules": None})] == [1, 3, 0]


def check_files(weights: Weights, folder: Path) -> None:
    save_file(weights, folder / "model.safetensors")
    check_mtp_checkpoint(folder, CONFIG, 1)


def check_stream(weights: Weights, folder: Path) -> None:
    for _ in mtp_weights(weights.items(), CONFIG, 0):
        pass


@pytest.fixture(params=[check_files, check_stream])
def check(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Weights], None]:
    return lambda weights: request.param(weights, tmp_path)


def test_whole_modules_pass(check: Callable[[Weights], None]):
    check(with_modules(1))


@pytest.mark.parametrize("name", ["enorm.weight", "transformer_layer.block_sparse_moe.experts.1.w3.weight"])
def test_a_missing_weight_is_named(check: Callable[[Weights], None], name: str):
    weights = with_modules(1)
    del weights[f"{PREFIX}0.{name}"]
    with pytest.raises(CheckpointError, match=f"lacks .*{name}"):
        check(weights)


@pytest.mark.parametrize("name", ["eh_proj.weight", "transformer_layer.self_attn.o_proj.weight"])
def test_a_weight_of_another_shape_is_named(check: Callable[[Weights], None], name: str):
    weights = with_modules(1)
    weights[f"{PREFIX}0.{name}"] = torch.zeros(3, 64)
    with pytest.raises(CheckpointError, match=rf"{name} has the shape \[3, 64\], but config\.json makes it \[64, "):
        check(weights)


@pytest.mark.parametrize("name", ["eh_proj.bias", "transformer_layer.mlp.up_proj.weight"])
def test_an_unknown_weight_is_named(check: Callable[[Weights], None], name: str):
    with pytest.raises(CheckpointError, match=f"no place for: .*{name}"):
        check(with_modules(1) | {f"{PREFIX}0.{name}": torch.zeros(1)})


def test_scales_of_quantized_weights_pass(check: Callable[[Weights], None]):
    check(with_modules(1) | {f"{PREFIX}0.eh_proj.weight_scale_inv": torch.zeros(1)})


def test_a_promise_that_is_not_kept(tmp_path: Path):
    with pytest.raises(CheckpointError, match="promises num_mtp_modules=1, but the checkpoint holds no mtp"):
        check_files(with_modules(0), tmp_path)


def test_a_module_more_than_the_config_has(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"no place for: .*mtp\.layers\.1\."):
        check_files(with_modules(2), tmp_path)


def test_a_module_less_than_the_config_has(tmp_path: Path):
    save_file(with_modules(1), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks .*mtp\.layers\.1\."):
        check_mtp_checkpoint(tmp_path, CONFIG, 2)


def test_a_folder_without_files_is_left_to_the_loader(tmp_path: Path):
    check_mtp_checkpoint(tmp_path, CONFIG, 1)
