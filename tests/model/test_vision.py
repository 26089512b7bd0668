"""The vision half of a checkpoint: one config of two forms, one name of three, and nothing lost, unknown or twice."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from msa_backend.config import MSAConfigError
from msa_backend.model.checkpoint import check_checkpoint
from msa_backend.model.config import M3Config
from msa_backend.model.vision import (
    VisionConfig,
    canonical_vision_name,
    canonical_vision_weights,
    expected_vision_shapes,
)
from msa_backend.model.weights import CheckpointError, is_vision_weight
from msa_backend.tiny import QUANTIZATIONS, write_tiny_checkpoint

from ..refusal import sentence

CONFIG = VisionConfig(
    hidden_size=12,
    intermediate_size=20,
    num_layers=2,
    num_channels=3,
    patch_size=4,
    temporal_patch_size=2,
    merge_size=2,
    rope_theta=10_000.0,
    projector_size=16,
    text_hidden_size=24,
    section={},
)
TOWER = "vision_model.encoder.layers.0.mlp.fc1.weight"


def weights() -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape) for name, shape in expected_vision_shapes(CONFIG).items()}


def read(folder: Path) -> tuple[M3Config, VisionConfig]:
    config = json.loads((folder / "config.json").read_text())
    return M3Config.from_text_config(config["text_config"]), VisionConfig.from_config(config)


@pytest.mark.parametrize("form", ["tiny", "native", "default"])
def test_every_form_holds_what_its_config_asks_for(form: str, request: pytest.FixtureRequest):
    folder = request.getfixturevalue(form)
    check_checkpoint(folder, *read(folder))


@pytest.mark.parametrize("form", ["native", "default"])
def test_the_config_is_the_same_in_every_form(form: str, tiny: Path, request: pytest.FixtureRequest):
    _, original = read(tiny)
    _, other = read(request.getfixturevalue(form))
    assert replace(other, section={}) == replace(original, section={})
    asked = original.original_section()
    compression = {"spatial_merge_size": 2, "temporal_patch_size": 2}
    assert asked["img_token_compression_config"] == compression
    shared = original.section.keys() & other.section.keys() - {"model_type"}
    assert shared
    for key in (*shared, "rope_theta", "img_token_compression_config"):
        assert other.original_section()[key] == asked[key], key


@pytest.mark.parametrize(
    "name",
    [
        f"vision_tower.{TOWER}",
        "model.vision_tower.layers.0.mlp.fc1.weight",
        f"vision_tower.{TOWER.replace('.mlp.', '.block_sparse_moe.')}",
    ],
)
def test_names(name: str):
    assert is_vision_weight(name)
    assert canonical_vision_name(name) == TOWER


def test_nothing_is_lost():
    found = dict(canonical_vision_weights(weights().items(), CONFIG))
    assert found.keys() == expected_vision_shapes(CONFIG).keys()


def test_a_missing_weight_is_named():
    held = weights()
    del held[TOWER]
    with pytest.raises(CheckpointError, match=rf"lacks .*{TOWER}"):
        list(canonical_vision_weights(held.items(), CONFIG))


def test_an_unknown_weight_is_named():
    with pytest.raises(CheckpointError, match="no place for: vision_tower.more"):
        list(canonical_vision_weights([("vision_tower.more", torch.zeros(1))], CONFIG))


def test_a_weight_that_is_there_twice_is_named():
    twice = [(TOWER, torch.zeros(1)), (f"vision_tower.{TOWER}", torch.zeros(1))]
    with pytest.raises(CheckpointError, match=f"{TOWER} twice"):
        list(canonical_vision_weights(twice, CONFIG))


def test_a_file_of_another_vision_model_is_refused(tiny: Path):
    text, vision = read(tiny)
    with pytest.raises(CheckpointError, match="fc1"):
        check_checkpoint(tiny, text, replace(vision, intermediate_size=64))
    with pytest.raises(CheckpointError, match="lacks .*layers.2"):
        check_checkpoint(tiny, text, replace(vision, num_layers=3))


@pytest.fixture(scope="module", params=QUANTIZATIONS)
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text model quantized and the vision half not, as it is published."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("quantized") / request.param, quantization=request.param)


def with_tower(quantized: Path, target: Path, **tensors: torch.Tensor | None) -> Path:
    """The checkpoint with other tensors of one module of the tower, or without those that are None."""
    shutil.copytree(quantized, target)
    file = target / "model.safetensors"
    changed = {f"vision_tower.{TOWER.removesuffix('weight')}{name}": tensor for name, tensor in tensors.items()}
    held = {name: tensor for name, tensor in (load_file(file) | changed).items() if tensor is not None}
    save_file(held, file, {"format": "pt"})
    return target


def test_a_plain_vision_half_beside_a_quantized_text_model(quantized: Path):
    check_checkpoint(quantized, *read(quantized))


def test_a_missing_vision_weight_is_named_beside_a_quantized_text_model(quantized: Path, tmp_path: Path):
    folder = with_tower(quantized, tmp_path / "m", weight=None)
    message = sentence(check_checkpoint, folder, *read(folder), error=CheckpointError)
    assert message.startswith(f"the checkpoint lacks weights that its config asks for: {TOWER};")
    check_checkpoint(folder, read(folder)[0])


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("weight", torch.zeros(320, 160).to(torch.float8_e4m3fn)),
        ("weight_scale_inv", torch.ones(320, 5, dtype=torch.uint8)),
        ("input_scale", torch.ones(1)),
    ],
)
def test_a_quantized_vision_half_is_refused(name: str, tensor: torch.Tensor, quantized: Path, tmp_path: Path):
    """Before it is loaded where it lies in a folder, else as it comes; and only where images are served."""
    folder = with_tower(quantized, tmp_path / "m", **{name: tensor})
    found = f"vision_tower.{TOWER.removesuffix('weight')}{name}"
    said = f"{found} is of a quantized vision half, but images are served with an unquantized one; "
    assert sentence(check_checkpoint, folder, *read(folder), error=CheckpointError).startswith(said)
    with pytest.raises(CheckpointError, match=re.escape(said)):
        list(canonical_vision_weights([(found, tensor)], CONFIG))
    check_checkpoint(folder, read(folder)[0])


def test_a_config_without_a_vision_section():
    with pytest.raises(MSAConfigError, match="lacks vision_config.*--language-model-only"):
        VisionConfig.from_config({"text_config": {"hidden_size": 24}})
