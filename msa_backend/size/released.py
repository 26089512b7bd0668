"""The released model's text config, which is public; its weights were never loaded here."""

from __future__ import annotations

from typing import Any

_LAYERS = [0] * 3 + [1] * 57

TEXT_CONFIG: dict[str, Any] = {
    "vocab_size": 200_064,
    "hidden_size": 6144,
    "intermediate_size": 3072,
    "dense_intermediate_size": 12_288,
    "shared_intermediate_size": 3072,
    "num_hidden_layers": 60,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 524_288,
    "rope_theta": 5_000_000,
    "rotary_dim": 64,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "moe_layer_freq": _LAYERS,
    "sparse_attention_config": {
        "use_sparse_attention": True,
        "sparse_index_dim": 128,
        "sparse_num_index_heads": 4,
        "sparse_topk_blocks": 16,
        "sparse_block_size": 128,
        "sparse_disable_index_value": _LAYERS,
        "sparse_score_type": "max",
        "sparse_init_block": 0,
        "sparse_local_block": 1,
        "sparse_attention_freq": _LAYERS,
    },
}
