"""Quantized tiny checkpoints: no weight is further from its original than rounding takes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from msa_backend.model.checkpoint import check_checkpoint
from msa_backend.model.config import M3Config
from msa_backend.tiny import QUANTIZATIONS, TinyCheckpointError, TinyShape, write_tiny_checkpoint
from tests import oracle
from tests.dequantize import SCALE, dequantized, load_shards, spread, write_dequantized

QUANTIZED_IN_TOTAL = 4 * 4 + 3 * 2 + 3 + 3 * (8 + 1) * 3  # q, k, v, o; index q and k; dense MLP; experts, shared one
MANTISSA_BITS, SMALLEST_EXPONENT = 3, -6
NEAR = 0.5  # it is 0.17, and at least 1.8 with the scales of values, outputs or experts doubled


@pytest.fixture(scope="module", params=QUANTIZATIONS)
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / request.param
    return write_tiny_checkpoint(folder, quantization=request.param, dtype="bfloat16", shards=2)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "plain", dtype="bfloat16")


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def test_weights_are_half_a_step_from_the_originals_at_most(quantized: Path, plain: Path):
    weights, originals = load_shards(quantized), load_shards(plain)
    restored = dequantized(weights)
    assert restored.keys() == originals.keys()
    scaled = [name.removesuffix(SCALE) + ".weight" for name in weights if name.endswith(SCALE)]
    assert len(scaled) == QUANTIZED_IN_TOTAL
    for name in originals.keys() - scaled:
        assert torch.equal(restored[name], originals[name]), name
    for name in scaled:
        original = originals[name].float()
        scale = spread(weights[name.removesuffix(".weight") + SCALE], original.shape)
        exponent = (original / scale).abs().log2().floor().clamp(min=SMALLEST_EXPONENT)
        half_a_step = scale * (exponent - MANTISSA_BITS - 1).exp2()
        assert ((restored[name] - original).abs() <= half_a_step).all(), name
        # As fine as eight bits allow: the largest weight of a block is in the upper half of the range.
        assert (weights[name].float().abs().amax() >= 224).item(), name


def test_restored_weights_are_exact_in_bf16(quantized: Path):
    weights = load_shards(quantized)
    half, full = dequantized(weights, torch.bfloat16), dequantized(weights)
    for name in half:
        assert torch.equal(half[name].float(), full[name].float()), name


def test_the_config_and_the_weights_agree(quantized: Path):
    config = read_config(quantized)
    ignored = config["quantization_config"]["ignored_layers"]
    assert "language_model.lm_head" in ignored and "vision_tower" in ignored
    check_checkpoint(quantized, M3Config.from_text_config(config["text_config"]))


def test_restored_checkpoints_run(quantized: Path, plain: Path, tmp_path: Path):
    """`transformers` on the restored weights is near the model before quantization, and not the same."""
    prompt = oracle.random_prompt(200)
    restored = oracle.load(write_dequantized(quantized, tmp_path / "restored"))
    gap = (oracle.prompt_logprobs(restored, prompt) - oracle.prompt_logprobs(oracle.load(plain), prompt)).abs()
    assert 1e-3 < gap.mean() < NEAR


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"quantization": "int4"}, "must be one of mxfp8, fp8"),
        ({"quantization": "fp8", "form": "transformers"}, "have the original form; choose that"),
        ({"quantization": "fp8", "shape": TinyShape(expert_size=96)}, r"\[96, 256\], .* blocks of 128 x 128"),
    ],
)
def test_refuses_arguments(arguments: dict[str, Any], sentence: str, tmp_path: Path):
    with pytest.raises(TinyCheckpointError, match=sentence):
        write_tiny_checkpoint(tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()
