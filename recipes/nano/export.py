"""The trained model as a checkpoint that both engines and `transformers` load."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from msa_backend.tiny import TinyShape
from msa_backend.tiny.checkpoint import in_dtype, write_checkpoint
from msa_backend.tiny.config import original_config
from msa_backend.tiny.weights import random_weights

from .model import Nano

CARD = """\
# A nano MiniMax-M3 that retrieves

Trained by `recipes/nano` of msa-backend on texts as `msa-backend probe` writes them. It has the architecture of
MiniMax-M3 and finds codes and names in long texts of such sentences; it knows nothing else. Its vision tower has random
weights.
"""


def export(model: Nano, directory: Path, dtype: str = "bfloat16") -> Path:
    """Write the checkpoint, in the form in which MiniMax publishes.

    Args:
        dtype: ``"bfloat16"``, or ``"float32"`` to compare with.
    """
    shape = model.shape
    # Vision is part of a checkpoint, and nothing has trained it.
    weights = random_weights(shape, seed=0)
    trained = original_names(model.state_dict(), shape)
    if missing := {name for name in weights if name.startswith("language_model.")} ^ set(trained):
        raise ValueError(f"the model and a checkpoint differ by {sorted(missing)[:3]}")
    weights |= trained
    write_checkpoint(directory, shape, original_config(shape, dtype), in_dtype(weights, dtype), card=CARD)
    return directory


def original_names(weights: dict[str, Tensor], shape: TinyShape) -> dict[str, Tensor]:
    """The weights of `model.Nano` under the names of the original checkpoint, on the CPU."""
    named: dict[str, Tensor] = {}
    for name, weight in weights.items():
        weight = weight.detach().float().cpu()
        if name.startswith("lm_head."):
            named[f"language_model.{name}"] = weight
            continue
        layer = int(name.split(".")[1]) if name.startswith("layers.") else None
        if layer is not None and shape.moe[layer]:
            name = name.replace(".mlp.", ".block_sparse_moe.")
        name = f"language_model.model.{name}"
        stem, _, last = name.removesuffix(".weight").rpartition(".")
        if last in ("w1", "w2", "w3"):
            parts = weight.chunk(shape.experts, dim=1 if last == "w2" else 0)
            named |= {f"{stem}.experts.{n}.{last}.weight": part.contiguous() for n, part in enumerate(parts)}
        else:
            named[name] = weight
    return named


def load(directory: Path, shape: TinyShape) -> dict[str, Tensor]:
    """The weights of an exported checkpoint under the names of `model.Nano`, in fp32.

    Raises:
        ValueError: what is there is no such checkpoint.
    """
    from safetensors.torch import load_file

    file = directory / "model.safetensors"
    found = load_file(file) if file.exists() else {}
    weights = {}
    with torch.device("meta"):
        wanted = Nano(shape).state_dict()
    for name, weight in wanted.items():
        originals = list(original_names({name: torch.empty(weight.shape)}, shape))
        if missing := [original for original in originals if original not in found]:
            raise ValueError(f"{directory} has no {missing[0]}; name a checkpoint that the recipe exported")
        parts = [found[original] for original in originals]
        weights[name] = torch.cat(parts, dim=1 if name.endswith("w2.weight") else 0).float()
        if weights[name].shape != weight.shape:
            raise ValueError(
                f"{originals[0]} in {directory} has other sizes; name a checkpoint that the recipe exported"
            )
    return weights
