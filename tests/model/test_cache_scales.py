"""Scales of an fp8 cache: under which names they come, and which sets of them are refused in one sentence."""

from __future__ import annotations

import logging

import pytest
import torch

from msa_backend.model.cache_scales import check_cache_scales, owner, set_aside
from msa_backend.model.config import M3Config
from msa_backend.model.quantized import Stored
from msa_backend.model.weights import CheckpointError

from . import configs

CONFIG = M3Config.from_text_config(configs.original())
MODULE = "model.mtp.layers.0.transformer_layer.self_attn"
ONE = torch.ones(())
LAYER = "language_model.model.layers.1.self_attn"


@pytest.mark.parametrize("wrapper", ["language_model.model.", "model.language_model.", "model."])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("k_proj.k_scale", "k"), ("v_proj.v_scale", "v"), ("k_scale", "k"), ("attn.v_scale", "v"), ("kv_scale", "kv"),
        ("q_scale", "q"), ("qkv_proj.v_scale", "v"), ("k_proj.output_scale", "k"), ("v_proj.output_scale", "v"),
        ("q_proj.output_scale", "q"), ("prob_output_scale", "prob"), ("attn.prob_scale", "prob"),
    ],
)  # fmt: skip
def test_names(name: str, kind: str, wrapper: str):
    assert owner(f"{wrapper}layers.12.self_attn.{name}") == ("model.layers.12.self_attn", kind)


def test_names_of_drafts():
    assert owner(f"language_model.{MODULE}.k_proj.k_scale") == (MODULE, "k")


@pytest.mark.parametrize("name", ["k_proj.weight_scale", "k_proj.weight", "k_norm.weight", "k_proj.input_scale"])
def test_other_tensors(name: str):
    assert owner(f"{LAYER}.{name}") is None


def test_set_aside():
    stream = {
        f"{LAYER}.k_proj.k_scale": torch.tensor([0.5]),
        "other": torch.ones(2),
        f"{LAYER}.v_scale": torch.ones(()),
    }
    found: dict[str, dict[str, float]] = {}
    assert [name for name, _ in set_aside(stream.items(), found)] == ["other"]
    assert found == {"model.layers.1.self_attn": {"k": 0.5, "v": 1.0}}
    list(set_aside([(f"{LAYER}.kv_scale", torch.tensor(3.0))], found))
    assert found == {"model.layers.1.self_attn": {"k": 3.0, "v": 3.0}}


@pytest.mark.parametrize("value", [0.0, -1.0, torch.inf, torch.nan, [1.0, 2.0]])
def test_no_positive_number(value: float | list[float]):
    with pytest.raises(CheckpointError, match=r"k_scale is .*, but a scale of an fp8 KV cache is one positive number"):
        list(set_aside([(f"{LAYER}.k_scale", torch.tensor(value))], {}))


def every(*kinds: str) -> list[Stored]:
    return [
        Stored(f"language_model.model.layers.{layer}.self_attn.{kind}_scale", "F32", ())
        for layer in range(CONFIG.num_layers)
        for kind in kinds
    ]


def test_all_layers_have_them(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        check_cache_scales(every("k", "v"), CONFIG)
        check_cache_scales(every("kv"), CONFIG)
        check_cache_scales([*every("k", "v"), Stored(f"{MODULE}.k_scale", "F32", ())], CONFIG)
    assert not caplog.records


def test_layers_without_any_are_named(caplog: pytest.LogCaptureFixture):
    check_cache_scales(every("k", "v")[:2], CONFIG)
    check_cache_scales([], CONFIG)
    partly, none = (record.getMessage() for record in caplog.records)
    assert f"for {CONFIG.num_layers - 1} of {CONFIG.num_layers} layers (model.layers.1.self_attn.k_scale is" in partly
    assert "(model.layers.0.self_attn.k_scale is the first)" in none


def test_what_sparse_layers_do_not_read_is_named(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        check_cache_scales(every("q", "k", "v", "prob"), CONFIG)
    sparse = sum(CONFIG.msa.sparse_layers)
    first = CONFIG.msa.sparse_layers.index(True)
    (record,) = caplog.records
    assert f"layers.{first}.self_attn.q_scale and {2 * sparse - 1} more scales" in record.getMessage()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (every("k", "v")[1:], r"holds .*layers\.0\.self_attn\.v_scale, but no model\.layers\.0\.self_attn\.k_scale"),
        (every("k", "v")[:-1], r"but no model\.layers\.\d+\.self_attn\.v_scale"),
        ([*every("k", "v"), Stored(f"{LAYER}.k_proj.k_scale", "F32", ())], r"k_scale and .* are the same scale"),
        ([*every("k", "v"), Stored(f"{LAYER}.kv_scale", "F32", ())], r"k_scale and .*kv_scale are the same scale"),
        ([Stored(f"{LAYER}.k_scale", "F32", (4,))], r"is F32 of the shape \[4\], but .* one number a layer"),
        ([Stored(f"{LAYER}.k_scale", "U8", (1,))], r"is U8 of the shape \[1\], but"),
        ([Stored("model.layers.99.self_attn.k_scale", "F32", ())], r"no place for: model\.layers\.99\.self_attn"),
    ],
)
def test_sets_that_do_not_fit(changed: list[Stored], says: str):
    with pytest.raises(CheckpointError, match=says):
        check_cache_scales(changed, CONFIG)
