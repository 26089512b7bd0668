"""The ``config.json`` of a tiny checkpoint, in the original form and in the form of ``transformers``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msa_backend.config import BLOCK_SIZE, HEAD_DIM
from msa_backend.tiny.shape import TinyShape
from msa_backend.tiny.tokenizer import BOS, EOS, IMAGE, PAD, VIDEO, token_id, vocab_size
from msa_backend.tiny.words import WORDS

ARCHITECTURE = "MiniMaxM3SparseForConditionalGeneration"
PATCH_SIZE, TEMPORAL_PATCH_SIZE, SPATIAL_MERGE_SIZE = 14, 2, 2


def original_config(shape: TinyShape, dtype: str) -> dict[str, Any]:
    """The config as MiniMax writes it: a nested sparse section, per-layer lists of 0 and 1."""
    sparse = [int(flag) for flag in shape.sparse_attention]
    text = _common_text(shape) | {
        "architectures": ["MiniMaxM3SparseForCausalLM"],
        "model_type": "minimax_m3_text",
        "hidden_act": "swigluoai",
        "use_gemma_norm": True,
        "use_qk_norm": True,
        "qk_norm_type": "per_head",
        "attention_output_gate": False,
        "rope_theta": shape.rope_theta,
        "partial_rotary_factor": shape.rotary_dim / HEAD_DIM,
        "n_shared_experts": 1,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "num_mtp_modules": shape.mtp_modules,
        "moe_layer_freq": [int(flag) for flag in shape.moe],
        "sparse_attention_config": {
            "use_sparse_attention": True,
            "sparse_index_dim": HEAD_DIM,
            "sparse_num_index_heads": shape.kv_heads,
            "sparse_topk_blocks": shape.topk,
            "sparse_block_size": BLOCK_SIZE,
            "sparse_disable_index_value": sparse,
            "sparse_score_type": "max",
            "sparse_init_block": 0,
            "sparse_local_block": shape.local_blocks,
            "sparse_attention_freq": sparse,
        },
        "torch_dtype": dtype,
    }
    vision = _common_vision(shape) | {
        "model_type": "clip_vision_model",
        "rope_theta": 10000.0,
        "position_embedding_type": "rope",
        "rope_mode": "3d",
        "img_token_compression_config": {
            "image_token_compression_method": "patch_merge",
            "spatial_merge_size": SPATIAL_MERGE_SIZE,
            "temporal_patch_size": TEMPORAL_PATCH_SIZE,
        },
    }
    return _common_top(shape) | {"torch_dtype": dtype, "text_config": text, "vision_config": vision}


def transformers_config(shape: TinyShape, dtype: str) -> dict[str, Any]:
    """The config in the flat vocabulary of ``transformers``; of the original keys it has only the shared ones."""
    text = _common_text(shape) | {
        "model_type": "minimax_m3_vl_text",
        "hidden_act": "silu",
        "index_n_heads": shape.kv_heads,
        "index_head_dim": HEAD_DIM,
        "index_block_size": BLOCK_SIZE,
        "index_topk_blocks": shape.topk,
        "index_local_blocks": shape.local_blocks,
        "layer_types": ["minimax_m3_sparse" if flag else "full_attention" for flag in shape.sparse_attention],
        "mlp_layer_types": ["sparse" if flag else "dense" for flag in shape.moe],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": shape.rope_theta,
            "partial_rotary_factor": shape.rotary_dim / HEAD_DIM,
        },
    }
    vision = _common_vision(shape) | {
        "model_type": "minimax_m3_vl_vision",
        "spatial_merge_size": SPATIAL_MERGE_SIZE,
        "temporal_patch_size": TEMPORAL_PATCH_SIZE,
    }
    return _common_top(shape) | {"dtype": dtype, "text_config": text, "vision_config": vision}


def generation_config(words: Sequence[str] = WORDS) -> dict[str, Any]:
    """Greedy by default: a fixture should answer the same way twice."""
    return {
        "bos_token_id": token_id(BOS, words),
        "eos_token_id": token_id(EOS, words),
        "pad_token_id": token_id(PAD, words),
        "do_sample": False,
    }


def image_processor_config() -> dict[str, Any]:
    """Patch geometry for the image processors; what is left out has the released model's default."""
    return {
        "image_processor_type": "MiniMaxM3VLImageProcessor",
        "patch_size": PATCH_SIZE,
        "temporal_patch_size": TEMPORAL_PATCH_SIZE,
        "merge_size": SPATIAL_MERGE_SIZE,
    }


def video_processor_config() -> dict[str, Any]:
    """The same geometry for the video processors, which read a file of their own."""
    geometry = image_processor_config()
    del geometry["image_processor_type"]
    return {"video_processor_type": "MiniMaxM3VLVideoProcessor"} | geometry


def _common_top(shape: TinyShape) -> dict[str, Any]:
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "minimax_m3_vl",
        "image_token_index": token_id(IMAGE, shape.words),
        "video_token_index": token_id(VIDEO, shape.words),
        "projector_hidden_size": shape.projector_size,
        "tie_word_embeddings": False,
        "bos_token_id": token_id(BOS, shape.words),
        "eos_token_id": token_id(EOS, shape.words),
        "pad_token_id": token_id(PAD, shape.words),
    }


def _common_text(shape: TinyShape) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size(shape.words),
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": HEAD_DIM,
        "rotary_dim": shape.rotary_dim,
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": 1e-6,
        "intermediate_size": shape.expert_size,
        "shared_intermediate_size": shape.expert_size,
        "dense_intermediate_size": shape.dense_size,
        "num_local_experts": shape.experts,
        "num_experts_per_tok": shape.experts_per_token,
        "routed_scaling_factor": shape.routed_scaling,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "bos_token_id": token_id(BOS, shape.words),
        "eos_token_id": token_id(EOS, shape.words),
    }


def _common_vision(shape: TinyShape) -> dict[str, Any]:
    return {
        "hidden_size": shape.vision_hidden,
        "intermediate_size": shape.vision_mlp_size,
        "num_hidden_layers": shape.vision_layers,
        "num_attention_heads": shape.vision_heads,
        "num_channels": 3,
        "image_size": 672,
        "patch_size": PATCH_SIZE,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
    }
