"""Quantized checkpoints whose ignore list, weights and scales do not fit together are refused in one sentence."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from msa_backend.model.checkpoint import check_checkpoint
from msa_backend.model.config import M3Config
from msa_backend.model.quantization import parse_quantization, read_quantization
from msa_backend.model.weights import CheckpointError, canonical_weights, expected_shapes

from ..refusal import sentence
from . import configs

CONFIG = M3Config.from_text_config(configs.original())
WRAPPER = "language_model."
LAYER, DENSE = f"{WRAPPER}model.layers.1.self_attn", f"{WRAPPER}model.layers.0"
EXPERT = f"{WRAPPER}model.layers.2.block_sparse_moe.experts.1.w2"
HEAD = f"{WRAPPER}lm_head"
INDEXED = ("q_proj", "k_proj", "v_proj", "index_q_proj", "index_k_proj")

E4M3 = {"num_bits": 8, "type": "float"}


def compressed(**weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": E4M3 | weights}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}


MXFP8 = {"quant_method": "mxfp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "MXFP8"}
NESTED = {"quant_method": "modelopt", "quantization": {"quant_algo": "MXFP8", "exclude_modules": [HEAD]}}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
COMPRESSED = compressed(strategy="block", block_structure=[128, 128])
PER_TENSOR = {"quant_method": "fp8", "activation_scheme": "static"}
FORMS = {
    "mxfp8": MXFP8 | {"ignored_layers": [HEAD, "vision_tower"]},
    "modelopt": MODELOPT | {"ignore": [f"{HEAD}*"]},
    "nested": NESTED,
    "fp8": FP8 | {"ignored_layers": [HEAD, "vision_tower"]},
    "compressed": COMPRESSED | {"ignore": ["lm_head", "re:.*gate$"]},
}
SUFFIXES = {"mxfp8": "weight_scale_inv", "fp8": "weight_scale_inv"}


class Checkpoint:
    """A checkpoint in original form, quantized as ``section`` says but for ``plain`` modules."""

    def __init__(self, folder: Path, section: dict[str, Any], suffix: str, plain: tuple[str, ...] = ()) -> None:
        self.folder, self.section = folder, section
        rule = parse_quantization(section)
        self.weights: dict[str, torch.Tensor] = {}
        for name, shape in expected_shapes(CONFIG).items():
            module = f"{WRAPPER}{name.removesuffix('.weight')}"
            self.weights[f"{WRAPPER}{name}"] = torch.zeros(shape, dtype=torch.bfloat16)
            linear = "layers" in name and len(shape) == 2 and not name.endswith("moe.gate.weight")
            if linear and module not in plain:
                self.weights[f"{module}.weight"] = torch.zeros(shape).to(torch.float8_e4m3fn)
                dtype = torch.uint8 if rule.scale_dtypes == ("U8",) else torch.float32
                self.weights[f"{module}.{suffix}"] = torch.ones(rule.scale_shape(shape), dtype=dtype)

    def check(self) -> None:
        save_file(self.weights, self.folder / "model.safetensors")
        raw = {"text_config": configs.original(), "quantization_config": self.section}
        (self.folder / "config.json").write_text(json.dumps(raw))
        check_checkpoint(self.folder, CONFIG)

    def refusal(self) -> str:
        return sentence(self.check, error=CheckpointError)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Checkpoint]:
    def make(section: dict[str, Any] = FORMS["mxfp8"], plain: tuple[str, ...] = ()) -> Checkpoint:
        return Checkpoint(tmp_path, section, SUFFIXES.get(section["quant_method"], "weight_scale"), plain)

    return make


@pytest.mark.parametrize("form", FORMS)
def test_sound_checkpoints_pass(form: str, checkpoint: Callable[..., Checkpoint]):
    checkpoint(FORMS[form]).check()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("module", [f"{LAYER}.index_q_proj", f"{DENSE}.mlp.up_proj", EXPERT])
def test_a_missing_scale_is_named(module: str, form: str, checkpoint: Callable[..., Checkpoint]):
    made = checkpoint(FORMS[form])
    (scale,) = (name for name in made.weights if name.startswith(f"{module}.weight_scale"))
    del made.weights[scale]
    message = made.refusal()
    assert f"{module}.weight is quantized, but the checkpoint lacks its scale (weight_scale or" in message
    with pytest.raises(CheckpointError, match="lacks its scale"):
        dict(canonical_weights(made.weights.items(), CONFIG))


@pytest.mark.parametrize(
    ("form", "scale", "says"),
    [
        ("mxfp8", torch.ones(1024, 2), "is F32, but scales of mxfp8 are U8"),
        ("mxfp8", torch.ones(8, 1, dtype=torch.uint8), "has the shape [8, 1], but mxfp8 makes it [1024, 2]"),
        ("fp8", torch.ones(8, 1, dtype=torch.uint8), "is U8, but scales of fp8 are F32 or BF16"),
        ("fp8", torch.ones(1), "has the shape [1], but fp8 makes it [8, 1]"),
        ("compressed", torch.ones(1024, 1), "has the shape [1024, 1], but compressed-tensors makes it [8, 1]"),
    ],
)
def test_a_scale_of_another_form(form: str, scale: torch.Tensor, says: str, checkpoint: Callable[..., Checkpoint]):
    made = checkpoint(FORMS[form])
    name = f"{LAYER}.q_proj.{SUFFIXES.get(form, 'weight_scale')}"
    assert name in made.weights
    made.weights[name] = scale
    assert f"{name} {says}" in made.refusal()


def test_two_scales_of_one_weight(checkpoint: Callable[..., Checkpoint]):
    made = checkpoint()
    made.weights[f"{EXPERT}.weight_scale"] = made.weights[f"{EXPERT}.weight_scale_inv"].clone()
    assert f"{EXPERT}.weight has two scales" in made.refusal()


def test_a_scale_of_activations(checkpoint: Callable[..., Checkpoint]):
    made = checkpoint()
    made.weights[f"{EXPERT}.input_scale"] = torch.ones(1)
    assert f"{EXPERT}.input_scale is a scale of activations, but mxfp8 scales them as it computes" in made.refusal()


def test_lm_head_that_is_not_listed(checkpoint: Callable[..., Checkpoint]):
    """vLLM quantizes the head of MXFP8 checkpoints unless told otherwise, and never that of fp8 checkpoints."""
    message = checkpoint(MXFP8 | {"ignored_layers": []}).refusal()
    assert (
        f"{HEAD}.weight is BF16, but mxfp8 makes it F8_E4M3 and nothing in ignored_layers excludes lm_head" in message
    )
    checkpoint(FP8 | {"ignored_layers": []}).check()


def test_a_weight_that_should_be_quantized(checkpoint: Callable[..., Checkpoint]):
    message = checkpoint(plain=(f"{LAYER}.o_proj",)).refusal()
    assert f"{LAYER}.o_proj.weight is BF16, but mxfp8 makes it F8_E4M3" in message


def test_a_weight_that_should_not_be_quantized(checkpoint: Callable[..., Checkpoint]):
    message = checkpoint(MXFP8 | {"ignored_layers": [HEAD, f"{LAYER}.o_proj"]}).refusal()
    assert (
        f"{LAYER}.o_proj.weight is F8_E4M3, but model.layers.1.self_attn.o_proj in ignored_layers excludes" in message
    )
    made = checkpoint()
    made.weights[f"{WRAPPER}model.layers.1.block_sparse_moe.gate.weight"] = torch.zeros(3, 64).to(torch.float8_e4m3fn)
    assert "block_sparse_moe.gate.weight is F8_E4M3, but vLLM keeps" in made.refusal()


def test_an_entry_that_the_engine_takes_for_more(checkpoint: Callable[..., Checkpoint]):
    """vLLM looks for the entries of MXFP8 lists inside the names: this one was meant for a single layer."""
    entries = [HEAD, f"{WRAPPER}model.layers.1.self_attn", "o_proj"]
    plain = tuple(f"{LAYER}.{name}" for name in (*INDEXED, "o_proj"))
    message = checkpoint(MXFP8 | {"ignored_layers": entries}, plain).refusal()
    assert "o_proj.weight is F8_E4M3, but o_proj in ignored_layers excludes model.layers." in message


def test_a_scale_of_a_plain_weight(checkpoint: Callable[..., Checkpoint]):
    made = checkpoint(FP8 | {"ignored_layers": [f"{LAYER}.o_proj"]}, (f"{LAYER}.o_proj",))
    made.weights[f"{LAYER}.o_proj.weight_scale_inv"] = torch.ones(1, 8)
    assert f"{LAYER}.o_proj.weight_scale_inv is a scale, but model.layers.1.self_attn.o_proj in" in made.refusal()


@pytest.mark.parametrize("form", ["mxfp8", "fp8", "compressed"])
def test_a_list_that_matches_nothing(form: str, checkpoint: Callable[..., Checkpoint]):
    key = "ignore" if form == "compressed" else "ignored_layers"
    message = checkpoint(FORMS[form] | {key: ["transformer.layers.0.q_proj", "vision_tower"]}).refusal()
    assert f"{key} excludes transformer.layers.0.q_proj and matches no module of the model" in message


@pytest.mark.parametrize("entry", ["vision_tower", "vision_tower*", "re:^multi_modal_projector.*"])
def test_a_list_of_the_vision_tower_alone(entry: str, checkpoint: Callable[..., Checkpoint]):
    checkpoint(COMPRESSED | {"ignore": [entry]}).check()


def test_regular_expressions(checkpoint: Callable[..., Checkpoint]):
    """Those of compressed-tensors are matched from the start of the name in the engine, which has no wrapper."""
    plain = tuple(f"{DENSE}.self_attn.{name}" for name in INDEXED[:3])
    checkpoint(COMPRESSED | {"ignore": [r"re:.*layers\.0\.self_attn\.[qkv]_proj"]}, plain).check()
    message = checkpoint(COMPRESSED | {"ignore": ["lm_head", r"re:language_model.*layers\.0.*"]}, plain).refusal()
    assert f"{DENSE}.self_attn.k_proj.weight is BF16, but compressed-tensors makes it F8_E4M3" in message


@pytest.mark.parametrize(
    ("entries", "excluded", "rest"),
    [
        ([f"{LAYER}.{name}" for name in INDEXED[:3]], "k_proj", "index_k_proj"),
        ([f"{DENSE}.self_attn.v_proj"], "v_proj", "k_proj"),
        ([f"{DENSE}.mlp.gate_proj"], "gate_proj", "up_proj"),
    ],
)
@pytest.mark.parametrize("form", ["mxfp8", "fp8", "compressed"])
def test_a_fused_layer_excluded_by_half(
    form: str, entries: list[str], excluded: str, rest: str, checkpoint: Callable[..., Checkpoint]
):
    key = "ignore" if form == "compressed" else "ignored_layers"
    message = checkpoint(FORMS[form] | {key: [HEAD, *entries]}, tuple(entries)).refusal()
    assert f"{key} excludes model.layers." in message
    assert f".{excluded} but not model.layers." in message and f".{rest}, which are one layer" in message


@pytest.mark.parametrize("form", ["mxfp8", "fp8", "compressed"])
def test_excluded_layers_pass(form: str, checkpoint: Callable[..., Checkpoint]):
    key = "ignore" if form == "compressed" else "ignored_layers"
    entries = [f"{DENSE}.self_attn.{name}" for name in INDEXED[:3]] + [f"{LAYER}.{name}" for name in INDEXED]
    checkpoint(FORMS[form] | {key: [HEAD, *entries]}, tuple(entries)).check()


@pytest.mark.parametrize("form", ["mxfp8", "fp8"])
def test_one_listed_expert_excludes_all_of_its_layer(form: str, checkpoint: Callable[..., Checkpoint]):
    message = checkpoint(FORMS[form] | {"ignored_layers": [HEAD, EXPERT]}, (EXPERT,)).refusal()
    assert "experts.0.w1.weight is F8_E4M3 and" in message and f"{EXPERT}.weight is BF16" in message


def test_parts_of_different_dtypes(checkpoint: Callable[..., Checkpoint]):
    """Index projections left in bf16, as vLLM would load into an fp8 parameter without a word."""
    message = checkpoint(plain=(f"{LAYER}.index_q_proj", f"{LAYER}.index_k_proj")).refusal()
    assert f"{LAYER}.index_k_proj.weight is BF16 and {LAYER}.k_proj.weight is F8_E4M3, but they are one" in message


def test_per_tensor_scales_and_an_index_branch(checkpoint: Callable[..., Checkpoint]):
    message = checkpoint(PER_TENSOR).refusal()
    assert f"{LAYER}.index_k_proj.weight has one scale for the whole tensor, which vLLM cannot load" in message
    entries = tuple(f"{WRAPPER}model.layers.{layer}.self_attn.{name}" for layer in (1, 2, 3) for name in INDEXED)
    checkpoint(PER_TENSOR | {"ignored_layers": list(entries)}, entries).check()


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"quant_method": "awq"}, "quant_method is awq, but msa-backend knows mxfp8"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_method is modelopt NVFP4"),
        (FP8 | {"weight_block_size": [64, 64]}, "block of quantization_config is [64, 64]"),
        (compressed(strategy="channel"), "is 8 float channel"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "config_groups is 0 groups"),
    ],
)
def test_other_quantizations(section: dict[str, Any], says: str):
    with pytest.raises(CheckpointError) as refused:
        parse_quantization(section)
    assert says in str(refused.value)


def test_quantized_weights_of_a_plain_config(checkpoint: Callable[..., Checkpoint]):
    made = checkpoint()
    made.section = {}
    assert "is F8_E4M3, but config.json has no quantization_config" in made.refusal()


def test_the_file_of_modelopt(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(configs.original()))
    assert read_quantization(tmp_path) is None
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": NESTED["quantization"]}))
    read = read_quantization(tmp_path)
    assert read is not None and read.excluding("lm_head") == "lm_head"


@pytest.mark.parametrize(
    "name",
    ["k_proj.k_scale", "v_proj.v_scale", "k_scale", "attn.v_scale", "kv_scale", "q_scale", "k_proj.output_scale"],
)
def test_scales_of_an_fp8_cache_are_ignored(
    name: str, checkpoint: Callable[..., Checkpoint], caplog: pytest.LogCaptureFixture
):
    made = checkpoint()
    made.weights[f"{LAYER}.{name}"] = torch.ones(1)
    with caplog.at_level(logging.WARNING):
        made.check()
    (record,) = caplog.records
    assert f"holds scales of an fp8 KV cache ({LAYER}.{name}, 1 in all)" in record.getMessage()
    assert len(dict(canonical_weights(made.weights.items(), CONFIG))) == len(made.weights) - 1
