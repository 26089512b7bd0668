"""Checkpoints and configs that cannot be served, the same for every engine, and what is said of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

BAD_CONFIGS = [
    (lambda text: text.pop("sparse_attention_config"), "no sparse section"),
    (lambda text: text["sparse_attention_config"].update(sparse_block_size=64), "block size is 64"),
    (lambda text: text["sparse_attention_config"].update(sparse_num_index_heads=1), "1 index heads for 2 KV heads"),
    (lambda text: text["sparse_attention_config"].update(sparse_local_block=9), "9 local"),
    (lambda text: text.update(head_dim=64), "head_dim is 64"),
    (lambda text: text.update(layer_types=["full_attention"] * 4), "contradicts itself"),
]
"""(a change of the text config, words of the refusal)."""

LACKS_LAYER_4 = "lacks weights that its config asks for: model.layers.4."


def add_a_layer(text: dict[str, Any]) -> None:
    """To a text config of four layers, not to the weights."""
    text["num_hidden_layers"] += 1
    text["moe_layer_freq"].append(1)
    for key in ("sparse_attention_freq", "sparse_disable_index_value"):
        text["sparse_attention_config"][key].append(1)


def truncate_a_shard(folder: Path) -> str:
    """Cut the end off the last file of weights; returns what is said of it."""
    shard = sorted(folder.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1000])
    return f"{shard.name} is truncated"


def remove_weights(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
