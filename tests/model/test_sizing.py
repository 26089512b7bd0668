"""What the model takes, against what its files and the engine's caches hold."""

from __future__ import annotations

import json
import re
from math import prod
from pathlib import Path

import pytest

from msa_backend.model import sizing
from msa_backend.model.config import M3Config
from msa_backend.size.memory import GIB
from msa_backend.size.released import TEXT_CONFIG

from . import configs

DEPLOYMENT = Path(__file__).parents[2] / "docs" / "deployment.md"
MEMORY = {"H100": 79.6 * GIB, "A100": 79.3 * GIB, "H200": 139.8 * GIB}
"""As nvidia-smi reports cards of 80, 80 and 141 GB."""


def released() -> M3Config:
    """60 layers, of which 3 are dense."""
    return M3Config.from_text_config(TEXT_CONFIG)


def test_the_released_model():
    """428 billion parameters, of which two are the vision tower's; its files are 854 GB."""
    assert sizing.weight_bytes(released()) == pytest.approx(852e9, rel=2e-3)


def test_weights_are_those_of_the_files(tiny: Path):
    from safetensors import safe_open

    config = M3Config.from_text_config(json.loads((tiny / "config.json").read_text())["text_config"])
    elements = 0
    for shard in tiny.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            names = (name for name in file.keys() if "language_model" in name)  # noqa: SIM118, it is no dict
            elements += sum(prod(file.get_slice(name).get_shape()) for name in names)
    assert sizing.weight_bytes(config) == 2 * elements


def test_ranks_share_what_can_be_shared():
    config = released()
    whole = sizing.weight_bytes(config)
    # Index keys' projections, the router and norms are on each rank: well below a percent.
    assert whole < 4 * sizing.weight_bytes(config, 4) < 1.01 * whole
    # At 8 two ranks hold the same KV head, and its projections.
    assert sizing.cache_bytes(config, 8) == sizing.cache_bytes(config, 4)
    assert 8 * sizing.weight_bytes(config, 8) > 4 * sizing.weight_bytes(config, 4)
    assert sizing.cache_bytes(config, 2).kv == sizing.cache_bytes(config, 1).kv // 2
    assert sizing.cache_bytes(config, 2).index_keys == sizing.cache_bytes(config, 1).index_keys


def test_a_cache_in_fp8():
    config = released()
    bf16, fp8 = sizing.cache_bytes(config, 4), sizing.cache_bytes(config, 4, kv_item=1)
    assert (2 * fp8.kv, fp8.index_keys) == bf16


def test_what_an_h200_held():
    """vLLM 0.33 gave the benchmark's 20 layers 2,657,792 tokens of cache (benchmarks/results/engine-h200.json).

    How much it keeps back is measured there, so this says no more than that the rest of the formula is right.
    """
    config = M3Config.from_text_config(
        configs.original()
        | {
            "vocab_size": 200_064,
            "hidden_size": 3072,
            "intermediate_size": 1024,
            "shared_intermediate_size": 1024,
            "num_hidden_layers": 20,
            "num_attention_heads": 64,
            "num_key_value_heads": 4,
            "moe_layer_freq": [0] + [1] * 19,
            "sparse_attention_config": configs.original()["sparse_attention_config"]
            | {
                "sparse_num_index_heads": 4,
                "sparse_disable_index_value": [0] + [1] * 19,
                "sparse_attention_freq": [0] + [1] * 19,
            },
        }
    )
    cache = sizing.cache_bytes(config)
    assert sizing.tokens_that_fit(MEMORY["H200"], 8_300_000_000, cache) == pytest.approx(2_657_792, rel=0.01)


def test_the_table_of_the_deployment_page():
    """Each row: card, ranks, weights, cache, GB of weights a rank, bytes a token, tokens that fit."""
    config = released()
    rows = re.findall(r"^\| (H100|A100|H200) \| (\d) \| (\w+) \| (\w+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$",
                      DEPLOYMENT.read_text(), re.MULTILINE)  # fmt: skip
    assert len(rows) >= 6
    for card, ranks, form, kv, gigabytes, per_token, tokens in rows:
        weights = sizing.weight_bytes(config, int(ranks), form)
        cache = sizing.cache_bytes(config, int(ranks), kv_item=1 if kv == "fp8" else 2)
        fit = sizing.tokens_that_fit(MEMORY[card], weights, cache)
        assert gigabytes.strip() == f"{weights / 1e9:.0f}"
        assert per_token.strip() == f"{sum(cache):,}"
        assert tokens.strip() == (f"{fit / 1e6:.2f} million" if fit else "do not fit")
