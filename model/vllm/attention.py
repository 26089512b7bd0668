"""Attention of one layer, dense or sparse: project, norm per head, rotate, attend, project back."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import GemmaRMSNorm
from vllm.model_executor.layers.linear import (
    MinimaxM3QKVParallelLinearWithIndexer,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.platforms import current_platform

from msa_backend.kernels.api import HeadNorms
from msa_backend.vllm.cache_dtypes import FP8_KV, index_dtype, kv_dtype
from msa_backend.vllm.layer import MSAAttention

from ..config import M3Config
from ..heads import head_norms_of, split_heads
from .norm import FUSED_DTYPES

if TYPE_CHECKING:
    from vllm.config import VllmConfig


FUSED_OP = "fused_minimax_m3_qknorm_rope_kv_insert"


class _M3Attention(nn.Module):
    """What dense and sparse layers have in common."""

    def __init__(self, config: M3Config, qkv_proj: nn.Module, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        msa = config.msa
        ranks = get_tensor_model_parallel_world_size()
        self.head_dim = msa.head_dim
        self.num_heads = msa.num_heads // ranks
        # Fewer KV heads than ranks: each is replicated on several.
        self.num_kv_heads = max(1, msa.num_kv_heads // ranks)
        self.scale = msa.head_dim**-0.5
        self.qkv_proj = qkv_proj
        self.o_proj = RowParallelLinear(
            msa.num_heads * msa.head_dim,
            config.hidden_size,
            bias=False,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.q_norm = GemmaRMSNorm(msa.head_dim, eps=config.rms_norm_eps)
        self.k_norm = GemmaRMSNorm(msa.head_dim, eps=config.rms_norm_eps)
        self.rotary_emb = get_rope(
            msa.head_dim,
            max_position=config.max_position_embeddings,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": config.rope_theta,
                "partial_rotary_factor": config.rotary_dim / msa.head_dim,
            },
        )


class M3FullAttention(Attention):
    """vLLM's attention, with scales of an fp8 cache from any checkpoint: vLLM takes them from a quantized one alone."""

    cache_scales: Mapping[str, float] = {}

    def take_scales(self, scales: Mapping[str, float]) -> None:
        """Keep the checkpoint's scales of fp8 queries, keys and values for when all weights are loaded."""
        if hasattr(self, "k_scale"):
            self._fill(scales)
        elif self.kv_cache_dtype in FP8_KV:
            self.cache_scales = scales

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        super().process_weights_after_loading(act_dtype)
        if self.cache_scales:  # vLLM, which made no place for them, has just made all scales 1
            method = BaseKVCacheMethod(self.quant_config)
            method.create_weights(self)
            self._fill(self.cache_scales)
            method.process_weights_after_loading(self)

    def _fill(self, scales: Mapping[str, float]) -> None:
        for kind, value in scales.items():
            getattr(self, f"{kind}_scale").data.fill_(value)


class M3DenseAttention(_M3Attention):
    """Full causal attention, through the backend vLLM finds best for the platform."""

    def __init__(self, config: M3Config, vllm_config: VllmConfig, prefix: str) -> None:
        msa = config.msa
        qkv_proj = QKVParallelLinear(
            config.hidden_size,
            msa.head_dim,
            msa.num_heads,
            msa.num_kv_heads,
            bias=False,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        super().__init__(config, qkv_proj, vllm_config, prefix)
        # One launch for two norms and a rope, as vLLM's own M3 has it; in its GPU builds alone.
        dtype = vllm_config.model_config.dtype
        self.fused = current_platform.is_cuda() and dtype in FUSED_DTYPES and hasattr(torch.ops._C, FUSED_OP)
        self.attn = M3FullAttention(
            self.num_heads,
            self.head_dim,
            self.scale,
            num_kv_heads=self.num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        if self.fused:
            self._norm_and_rotate_in_place(positions, qkv)
        query, key, value = split_heads(self, qkv, positions, is_rotated=self.fused)
        output, _ = self.o_proj(self.attn(query, key, value))
        return output

    def _norm_and_rotate_in_place(self, positions: torch.Tensor, qkv: torch.Tensor) -> None:
        from vllm import _custom_ops

        _custom_ops.fused_minimax_m3_qknorm_rope_kv_insert(
            qkv,
            self.q_norm.weight,
            self.k_norm.weight,
            self.rotary_emb.cos_sin_cache,
            positions,
            self.num_heads,
            self.num_kv_heads,
            self.rotary_emb.rotary_dim,
            self.q_norm.variance_epsilon,
        )


class M3SparseAttention(_M3Attention):
    """Attention over the blocks that the index branch picks. One projection feeds both branches."""

    def __init__(self, config: M3Config, vllm_config: VllmConfig, prefix: str) -> None:
        msa = config.msa
        qkv_proj = MinimaxM3QKVParallelLinearWithIndexer(
            config.hidden_size,
            msa.head_dim,
            msa.num_heads,
            msa.num_kv_heads,
            msa.num_index_heads,
            msa.index_dim,
            bias=False,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        super().__init__(config, qkv_proj, vllm_config, prefix)
        self.index_q_norm = GemmaRMSNorm(msa.index_dim, eps=config.rms_norm_eps)
        self.index_k_norm = GemmaRMSNorm(msa.index_dim, eps=config.rms_norm_eps)
        self.attn = MSAAttention(
            self.num_heads,
            self.num_kv_heads,
            self.scale,
            msa,
            f"{prefix}.attn",
            dtype=kv_dtype(vllm_config),
            index_dtype=index_dtype(vllm_config),
        )

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        projected, _ = self.qkv_proj(hidden_states)
        output, _ = self.o_proj(self.attn(projected, positions, self.norms))
        return output

    @cached_property
    def norms(self) -> HeadNorms:
        return head_norms_of(self)
