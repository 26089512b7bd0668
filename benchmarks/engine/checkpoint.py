"""The model that is measured: MiniMax-M3's attention in layers small enough for one GPU."""

from __future__ import annotations

import json
from pathlib import Path

LAYERS = 20
DENSE = 1  # the released model has 3 of 60


def write(model: Path, layers: int = LAYERS, quantization: str | None = None) -> None:
    """A random checkpoint in bf16, `layers` layers of which the first is dense.

    `quantization` is one of `msa-backend tiny --quantization`. Without, 20 layers take 8.3 GB of disk, three times
    that of memory while they are written.
    """
    from msa_backend.tiny import TinyShape, write_tiny_checkpoint

    sparse = (False,) * DENSE + (True,) * (layers - DENSE)
    shape = TinyShape(
        hidden=3072, heads=64, kv_heads=4, topk=16, experts=16, experts_per_token=4, expert_size=1024, dense_size=6144,
        sparse_attention=sparse, moe=sparse, max_positions=1_048_576,
    )  # fmt: skip
    write_tiny_checkpoint(model, dtype="bfloat16", shards=4, shape=shape, overwrite=True, quantization=quantization)


def add_cache_scales(model: Path, layers: int) -> None:
    """Scales of K and of V for every layer, none like another, as tools that calibrate fp8 caches write them.

    Small enough for no number to be clipped: right results are as near to those of plain caches as without scales.
    """
    import torch
    from safetensors.torch import save_file

    scales = {
        f"language_model.model.layers.{layer}.self_attn.{kind}_proj.{kind}_scale": torch.tensor(first + step * layer)
        for layer in range(layers)
        for kind, first, step in (("k", 0.03, 0.0011), ("v", 0.05, 0.0017))
    }
    file = model / "cache-scales.safetensors"
    save_file(scales, file, {"format": "pt"})
    index = model / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] |= dict.fromkeys(scales, file.name)
    index.write_text(json.dumps(content))
