"""Every name of the three forms comes to its canonical weight; nothing is lost, invented or taken twice."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from msa_backend.model.config import M3Config
from msa_backend.model.weights import CheckpointError, canonical_parts, canonical_weights, expected_shapes

from . import configs

CONFIG = M3Config.from_text_config(configs.original())


def original_form() -> dict[str, torch.Tensor]:
    """Random weights under MiniMax's names, with vision and draft weights among them."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"language_model.{name}": torch.randn(shape, generator=generator)
        for name, shape in expected_shapes(CONFIG).items()
    }
    weights["vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"] = torch.zeros(1)
    weights["multi_modal_projector.linear_1.weight"] = torch.zeros(1)
    weights["patch_merge_mlp.linear_1.weight"] = torch.zeros(1)
    weights["language_model.model.mtp.layers.0.eh_proj.weight"] = torch.zeros(1)
    return weights


def default_form() -> dict[str, torch.Tensor]:
    """As ``save_pretrained`` writes by default: every MLP, dense and vision too, is a ``block_sparse_moe``."""
    return {name.replace(".mlp.", ".block_sparse_moe."): tensor for name, tensor in original_form().items()}


def native_form() -> dict[str, torch.Tensor]:
    """``transformers``' own names, experts fused into one tensor a layer, gate and up into one matrix."""
    old = {name.removeprefix("language_model."): tensor for name, tensor in original_form().items()}
    new = {}
    for name, tensor in old.items():
        if "mtp" in name:
            continue  # transformers drops the draft layers
        if "vision" in name or "multi_modal" in name or "merge" in name:
            new[f"model.{name.replace('vision_model.', '').replace('encoder.', '')}"] = tensor
        elif ".experts." in name and ".experts.0.w1" not in name:
            continue
        elif ".experts.0.w1" in name:
            stem, experts = name.split("0.w1")[0], range(CONFIG.num_experts)
            new[rename(f"{stem}gate_up_proj")] = torch.stack(
                [torch.cat([old[f"{stem}{e}.w1.weight"], old[f"{stem}{e}.w3.weight"]]) for e in experts]
            )
            new[rename(f"{stem}down_proj")] = torch.stack([old[f"{stem}{e}.w2.weight"] for e in experts])
        elif name.endswith(".gate_proj.weight"):
            fused = torch.cat([tensor, old[name.replace("gate_proj", "up_proj")]])
            new[rename(name.replace("gate_proj", "gate_up_proj"))] = fused
        elif not name.endswith(".up_proj.weight"):
            new[rename(name)] = tensor
    return new


def rename(name: str) -> str:
    for old, native in (
        ("model.", "model.language_model."),
        (".block_sparse_moe.e_score", ".mlp.gate.e_score"),
        (".block_sparse_moe.", ".mlp."),
        (".index_q_", ".indexer.q_"),
        (".index_k_", ".indexer.k_"),
    ):
        name = name.replace(old, native)
    return name


@pytest.mark.parametrize("form", [original_form, default_form, native_form])
def test_each_form_comes_to_the_same_weights(form):
    expected = {name.removeprefix("language_model."): tensor for name, tensor in original_form().items()}
    found = dict(canonical_weights(form().items(), CONFIG))
    assert found.keys() == expected_shapes(CONFIG).keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def test_text_only_names():
    weights = {name.removeprefix("language_model."): tensor for name, tensor in original_form().items()}
    assert dict(canonical_weights(weights.items(), CONFIG)).keys() == expected_shapes(CONFIG).keys()


def test_a_missing_weight_is_named():
    weights = original_form()
    del weights["language_model.model.layers.2.self_attn.index_k_proj.weight"]
    with pytest.raises(CheckpointError, match=r"lacks .*model\.layers\.2\.self_attn\.index_k_proj\.weight"):
        consume(canonical_weights(weights.items(), CONFIG))


@pytest.mark.parametrize(
    "name",
    [
        "language_model.model.layers.4.self_attn.q_proj.weight",  # a layer more than the config has
        "language_model.model.layers.0.self_attn.index_q_proj.weight",  # an index branch in a dense layer
        "language_model.model.layers.1.block_sparse_moe.experts.3.w1.weight",  # an expert too many
        "language_model.model.layers.1.self_attn.q_proj.bias",
    ],
)
def test_an_unknown_weight_is_named(name: str):
    weights = original_form() | {name: torch.zeros(1)}
    with pytest.raises(CheckpointError, match="no place for"):
        consume(canonical_weights(weights.items(), CONFIG))


def test_the_same_weight_twice():
    weights = original_form() | {"lm_head.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="twice"):
        consume(canonical_weights(weights.items(), CONFIG))


def test_scales_of_quantized_checkpoints_pass():
    name = "language_model.model.layers.1.block_sparse_moe.experts.0.w1.weight_scale_inv"
    weights = original_form() | {name: torch.ones(1)}
    assert name.removeprefix("language_model.") in dict(canonical_weights(weights.items(), CONFIG))


def test_vision_and_draft_weights_are_passed_over():
    for name in original_form():
        if "language_model" not in name or "mtp" in name:
            assert canonical_parts(name, CONFIG) == []


def consume(weights: Iterator[object]) -> None:
    for _ in weights:
        pass
