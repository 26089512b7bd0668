"""A quantized checkpoint in original form as plain weights again, for whatever serves no quantized ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SCALE = ".weight_scale_inv"


def load_shards(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(shard).items()}


def spread(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Each scale at all the places of a weight of ``shape`` that share it, float32; uint8 scales are E8M0."""
    if scale.dtype == torch.uint8:
        scale = (scale.float() - 127).exp2()
    for dim, (size, blocks) in enumerate(zip(shape, scale.shape, strict=True)):
        scale = scale.repeat_interleave(size // blocks, dim)
    return scale


def dequantized(weights: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Codes times scales in ``dtype``, without the scales; other weights as they are."""
    plain = {name: tensor for name, tensor in weights.items() if not name.endswith(SCALE)}
    for name in weights.keys() - plain.keys():
        weight = f"{name.removesuffix(SCALE)}.weight"
        plain[weight] = (plain[weight].float() * spread(weights[name], plain[weight].shape)).to(dtype)
    return plain


def write_dequantized(source: Path, target: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write the checkpoint at ``source`` with plain weights to ``target``: one file, no ``quantization_config``."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"), dirs_exist_ok=True)
    save_file(dequantized(load_shards(source), dtype), target / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config))
    return target
