"""A checkpoint that is damaged, or not its config's, is refused from its file headers alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from msa_backend.model.checkpoint import check_checkpoint
from msa_backend.model.config import M3Config
from msa_backend.model.weights import CheckpointError, canonical_weights

from . import configs
from .test_weights import native_form, original_form

CONFIG = M3Config.from_text_config(configs.original())


@pytest.fixture(params=["single", "sharded"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    weights = original_form()
    if request.param == "single":
        save_file(weights, tmp_path / "model.safetensors")
        return tmp_path
    names = sorted(weights)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for shard, part in shards.items():
        save_file({name: weights[name] for name in part}, tmp_path / shard)
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def test_whole_checkpoints_pass(folder: Path):
    check_checkpoint(folder, CONFIG)


def test_fused_tensors_pass(tmp_path: Path):
    save_file(native_form(), tmp_path / "model.safetensors")
    check_checkpoint(tmp_path, CONFIG)


@pytest.mark.parametrize("num_experts", [2, 4])
def test_a_fused_tensor_of_other_experts_is_named(tmp_path: Path, num_experts: int):
    """Cut by the config alone, a fourth expert would be dropped without a word."""
    save_file(native_form(), tmp_path / "model.safetensors")
    config = M3Config.from_text_config(configs.original() | {"num_local_experts": num_experts})
    with pytest.raises(
        CheckpointError, match=rf"holds 3 experts, .*num_local_experts in config\.json is {num_experts}"
    ):
        check_checkpoint(tmp_path, config)
    with pytest.raises(CheckpointError, match="holds 3 experts"):
        dict(canonical_weights(native_form().items(), config))


@pytest.mark.parametrize("keep", [0, 4, 20, -100])
def test_a_truncated_shard_is_named(folder: Path, keep: int):
    shard = sorted(folder.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=f"{shard.name} is truncated"):
        check_checkpoint(folder, CONFIG)


def test_a_file_of_something_else_is_named(folder: Path):
    shard = sorted(folder.glob("*.safetensors"))[-1]
    shard.write_bytes((64).to_bytes(8, "little") + b"<html>not found</html>" * 8)
    with pytest.raises(CheckpointError, match=f"{shard.name} has an unreadable header"):
        check_checkpoint(folder, CONFIG)


def test_an_absent_shard_is_named(tmp_path: Path):
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model-1-of-2\.safetensors and 1 more"):
        check_checkpoint(tmp_path, CONFIG)


def test_layer_count_and_lists_that_disagree_with_the_weights(folder: Path):
    """A config of five layers, consistent in itself, over the weights of four."""
    text = configs.original() | {"num_hidden_layers": 5, "moe_layer_freq": [0, 1, 1, 1, 1]}
    text["sparse_attention_config"] |= {
        "sparse_attention_freq": [0, 1, 1, 1, 1],
        "sparse_disable_index_value": [0, 1, 1, 1, 1],
    }
    with pytest.raises(CheckpointError, match=r"lacks .*model\.layers\.4\."):
        check_checkpoint(folder, M3Config.from_text_config(text))


def test_sparse_layers_that_disagree_with_the_weights(folder: Path):
    text = configs.original()
    text["sparse_attention_config"] |= {"sparse_attention_freq": [0, 0, 1, 1]}
    with pytest.raises(CheckpointError, match=r"no place for: .*layers\.1\.self_attn\.index_k_norm"):
        check_checkpoint(folder, M3Config.from_text_config(text))


def test_another_width_is_named(folder: Path):
    config = M3Config.from_text_config(configs.original() | {"dense_intermediate_size": 128})
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\..*\b96\b.*\b128\b"):
        check_checkpoint(folder, config)


def test_other_formats_are_left_to_the_engine(tmp_path: Path):
    torch.save({}, tmp_path / "pytorch_model.bin")
    check_checkpoint(tmp_path, CONFIG)
