"""One model's text config in both forms in which M3 configs exist."""

from __future__ import annotations

from typing import Any

LAYERS = 4


def original() -> dict[str, Any]:
    return {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 32,
        "dense_intermediate_size": 96,
        "shared_intermediate_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5_000_000,
        "rotary_dim": 64,
        "partial_rotary_factor": 0.5,
        "hidden_act": "swigluoai",
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "use_gemma_norm": True,
        "qk_norm_type": "per_head",
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "routed_scaling_factor": 2.0,
        "moe_layer_freq": [0, 1, 1, 1],
        "sparse_attention_config": {
            "use_sparse_attention": True,
            "sparse_index_dim": 128,
            "sparse_num_index_heads": 2,
            "sparse_topk_blocks": 4,
            "sparse_block_size": 128,
            "sparse_disable_index_value": [0, 1, 1, 1],
            "sparse_score_type": "max",
            "sparse_init_block": 0,
            "sparse_local_block": 1,
            "sparse_attention_freq": [0, 1, 1, 1],
        },
    }


def transformers() -> dict[str, Any]:
    config = original()
    for key in ("sparse_attention_config", "moe_layer_freq", "n_shared_experts", "rope_theta"):
        del config[key]
    for key in ("partial_rotary_factor", "use_gemma_norm", "qk_norm_type", "scoring_func", "use_routing_bias"):
        del config[key]
    return config | {
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 5_000_000, "partial_rotary_factor": 0.5},
        "layer_types": ["full_attention"] + ["minimax_m3_sparse"] * 3,
        "mlp_layer_types": ["dense"] + ["sparse"] * 3,
        "index_n_heads": 2,
        "index_head_dim": 128,
        "index_block_size": 128,
        "index_topk_blocks": 4,
        "index_local_blocks": 1,
    }
