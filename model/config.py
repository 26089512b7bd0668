"""M3Config: the text half of a MiniMax-M3 ``config.json``, in either form, checked. Free of every engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from msa_backend.config import MSAConfig, MSAConfigError, layer_flags, require


@dataclass(frozen=True)
class M3Config:
    """The text model. Sizes are of the whole model, before tensor parallelism.

    Attributes:
        msa: the attention half.
        moe_layers: for every layer, whether its MLP is a mixture of experts.
        rotary_dim: channels at the front of each head that rope rotates, half-split (NeoX) style.
        moe_intermediate_size: width of one routed expert.
        shared_intermediate_size: width of all shared experts together; 0 when there are none.
        dense_intermediate_size: width of the MLP of a dense layer.
        routed_scaling_factor: what the routed experts' sum is multiplied by.
        use_routing_bias: whether a bias is added to the sigmoid scores to choose experts (not to weigh them).
        swiglu_alpha, swiglu_limit: SwiGLU-OAI, ``(up + 1) * gate * sigmoid(alpha * gate)``, after clamping.
    """

    msa: MSAConfig
    vocab_size: int
    hidden_size: int
    num_layers: int
    rms_norm_eps: float
    rope_theta: float
    rotary_dim: int
    max_position_embeddings: int
    moe_layers: tuple[bool, ...]
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_intermediate_size: int
    dense_intermediate_size: int
    routed_scaling_factor: float
    use_routing_bias: bool
    swiglu_alpha: float
    swiglu_limit: float
    tie_word_embeddings: bool

    @classmethod
    def from_text_config(cls, config: Mapping[str, Any]) -> M3Config:
        """Read the text section of a ``config.json``.

        Raises:
            MSAConfigError: a key is missing, a value is not MiniMax-M3's, or two keys disagree.
        """
        msa = MSAConfig.from_text_config(config)
        for key, expected in (
            ("use_gemma_norm", True),
            ("qk_norm_type", "per_head"),
            ("use_qk_norm", True),
            ("attention_output_gate", False),
            ("scoring_func", "sigmoid"),
            ("swiglu_beta", 1.0),
        ):
            if config.get(key, expected) != expected:
                raise MSAConfigError(
                    f"{key} is {config[key]!r}, but MiniMax-M3 has {expected!r}, and nothing else is built"
                )
        if config.get("hidden_act", "swigluoai") not in ("swigluoai", "silu"):
            raise MSAConfigError(
                f"hidden_act is {config['hidden_act']!r}, but MiniMax-M3 has 'swigluoai' ('silu' in transformers' form)"
            )

        moe_width = require(config, "intermediate_size")
        rope = config.get("rope_parameters") or {}
        if (kind := rope.get("rope_type", "default")) != "default" or config.get("rope_scaling"):
            raise MSAConfigError(
                f"the model config asks for scaled rope ({config.get('rope_scaling') or kind}), but only MiniMax-M3's "
                "own, unscaled rope is built; remove it and stay within max_position_embeddings"
            )
        return cls(
            msa=msa,
            vocab_size=require(config, "vocab_size"),
            hidden_size=require(config, "hidden_size"),
            num_layers=len(msa.sparse_layers),
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=config.get("rope_theta") or rope.get("rope_theta") or 5_000_000.0,
            rotary_dim=_rotary_dim(config, rope, msa.head_dim),
            max_position_embeddings=require(config, "max_position_embeddings"),
            moe_layers=layer_flags(
                "are mixtures of experts",
                len(msa.sparse_layers),
                ("moe_layer_freq", config.get("moe_layer_freq")),
                ("mlp_layer_types", config.get("mlp_layer_types")),
                {"dense": False, "sparse": True},
            ),
            num_experts=require(config, "num_local_experts"),
            num_experts_per_tok=require(config, "num_experts_per_tok"),
            moe_intermediate_size=moe_width,
            shared_intermediate_size=_shared_width(config, moe_width),
            dense_intermediate_size=require(config, "dense_intermediate_size"),
            routed_scaling_factor=config.get("routed_scaling_factor", 1.0),
            use_routing_bias=config.get("use_routing_bias", True),
            swiglu_alpha=config.get("swiglu_alpha", 1.702),
            swiglu_limit=config.get("swiglu_limit", 7.0),
            tie_word_embeddings=config.get("tie_word_embeddings", False),
        )


def text_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The text half of a whole ``config.json``, which is the config itself in a text-only checkpoint."""
    return config.get("text_config") or config


def overlay(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes`` laid over it, section by section: a section that both have is not replaced."""
    merged = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = overlay(merged[key], value) if nested else value
    return merged


def _rotary_dim(config: Mapping[str, Any], rope: Mapping[str, Any], head_dim: int) -> int:
    found = {}
    if config.get("rotary_dim") is not None:
        found["rotary_dim"] = config["rotary_dim"]
    for source in (config, rope):
        if source.get("partial_rotary_factor") is not None:
            found["partial_rotary_factor"] = int(head_dim * source["partial_rotary_factor"])
    if not found:
        raise MSAConfigError("the model config lacks rotary_dim (or partial_rotary_factor)")
    if len(set(found.values())) > 1:
        raise MSAConfigError(
            f"the model config contradicts itself: rotary_dim is {found['rotary_dim']}, "
            f"but partial_rotary_factor makes it {found['partial_rotary_factor']}"
        )
    return next(iter(found.values()))


def _shared_width(config: Mapping[str, Any], moe_width: int) -> int:
    found = {}
    if config.get("n_shared_experts") is not None:
        # The original form keeps one expert's width beside the number of experts.
        found["n_shared_experts"] = moe_width * config["n_shared_experts"]
    if config.get("shared_intermediate_size") is not None:
        found["shared_intermediate_size"] = config["shared_intermediate_size"] * config.get("n_shared_experts", 1)
    if not found:
        return 0
    if len(set(found.values())) > 1:
        raise MSAConfigError(
            "the model config contradicts itself: "
            f"n_shared_experts x intermediate_size is {found['n_shared_experts']}, "
            f"but n_shared_experts x shared_intermediate_size is {found['shared_intermediate_size']}"
        )
    return next(iter(found.values()))
