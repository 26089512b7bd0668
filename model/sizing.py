"""How much memory MiniMax-M3 takes on each rank: weights, and K/V and index keys a token. Free of every engine."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from math import prod
from typing import NamedTuple

from .config import M3Config
from .weights import expected_shapes

BITS = {"bf16": 16.0, "mxfp8": 8 + 8 / 32, "fp8": 8 + 32 / 128**2}
"""Of a quantized weight with its share of the scales: one byte for 32 weights, or four for 128 x 128."""
NEVER_QUANTIZED = ("model.embed_tokens.weight", "lm_head.weight", "block_sparse_moe.gate.weight")
OF_KV_HEADS = ("self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.index_q_proj.weight")
ROUTED = ".experts."
WHOLE_ON_EACH_RANK = ("norm.weight", "index_k_proj.weight", "block_sparse_moe.gate.weight", "e_score_correction_bias")
UTILIZATION = 0.92
"""Share of a GPU's memory that vLLM takes, unless ``--gpu-memory-utilization`` says otherwise."""
RESERVE = 8_000_000_000
"""Bytes beside weights and caches: activations of a step of 16,384 tokens, the kernels' workspace, CUDA graphs. What
vLLM 0.33 left over on an H200 with 20 layers of the released attention."""


class CacheBytes(NamedTuple):
    """Of one token on one rank.

    Attributes:
        kv: keys and values of all layers.
        index_keys: of the sparse layers. Each rank holds them all.
    """

    kv: int
    index_keys: int


def kv_heads_per_rank(config: M3Config, ranks: int) -> int:
    """Ranks beyond the number of KV heads share them: each holds one, as another does."""
    return max(1, config.msa.num_kv_heads // ranks)


def weight_bytes(config: M3Config, ranks: int = 1, form: str = "bf16") -> int:
    """Of the text model on one of ``ranks`` tensor-parallel ranks.

    Args:
        form: how linear layers and experts are kept, one of :data:`BITS`; all else is bf16.
    """
    return round(sum(bits for _, _, bits in _bits(config, ranks, form)) / 8)


def used_weights(config: M3Config, tokens: int, ranks: int = 1, form: str | None = None) -> float:
    """What ``tokens`` tokens of a step multiply by on one rank, of the routed experts as many as they meet on average.

    Args:
        form: as of :func:`weight_bytes`; None counts weights, not bytes.
    """
    # Each token goes to some experts, the same for none of them: so large a share of all is met by one or more.
    met = 1 - (1 - config.num_experts_per_tok / config.num_experts) ** tokens if config.num_experts else 0
    found = 0.0
    for name, count, bits in _bits(config, ranks, form or "bf16"):
        if config.tie_word_embeddings or name != "model.embed_tokens.weight":  # a row of it is looked up
            found += (count if form is None else bits / 8) * (met if ROUTED in name else 1)
    return found


def _bits(config: M3Config, ranks: int, form: str) -> Iterator[tuple[str, float, float]]:
    """Of each weight of the text model: its name, how many numbers of it lie on a rank, and in how many bits."""
    of_kv_heads = Fraction(kv_heads_per_rank(config, ranks), config.msa.num_kv_heads)
    for name, shape in expected_shapes(config).items():
        share = Fraction(1, ranks)
        if name.endswith(OF_KV_HEADS):
            share = of_kv_heads
        elif name.endswith(WHOLE_ON_EACH_RANK):
            share = Fraction(1)
        quantized = len(shape) == 2 and not name.endswith(NEVER_QUANTIZED)
        count = prod(shape) * float(share)
        yield name, count, count * (BITS[form] if quantized else BITS["bf16"])


def cache_bytes(config: M3Config, ranks: int = 1, kv_item: int = 2, index_item: int = 2) -> CacheBytes:
    """What a token's keys and values, and its index keys, take.

    Args:
        kv_item, index_item: bytes of an element: 2 in bf16, 1 in fp8.
    """
    msa = config.msa
    return CacheBytes(
        kv=config.num_layers * 2 * kv_heads_per_rank(config, ranks) * msa.head_dim * kv_item,
        index_keys=sum(msa.sparse_layers) * msa.index_dim * index_item,
    )


def tokens_that_fit(memory: float, weights: int, cache: CacheBytes) -> int:
    """Tokens of cache beside the weights in ``memory`` bytes of a GPU; 0 if not even the weights fit."""
    return max(0, int((memory * UTILIZATION - RESERVE - weights) / sum(cache)))
