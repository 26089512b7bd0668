"""Attention of one layer, dense or sparse: project, norm per head, rotate, attend, project back."""

from __future__ import annotations

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
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype

from msa_backend.vllm.layer import MSAAttention, NormRope

from ..config import M3Config
from ..heads import norm_heads

if TYPE_CHECKING:
    from vllm.config import VllmConfig


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

    def _norm_and_rotate(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor, q_norm: nn.Module, k_norm: nn.Module
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Contiguous, because vLLM's rope kernels write in place and the inputs are slices of one projection.
        query = norm_heads(q_norm, query, self.head_dim)
        key = norm_heads(k_norm, key, self.head_dim)
        return self.rotary_emb(positions, query, key)


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
        self.attn = Attention(
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
        kv_size = self.num_kv_heads * self.head_dim
        query, key, value = qkv.split([self.num_heads * self.head_dim, kv_size, kv_size], dim=-1)
        query, key = self._norm_and_rotate(positions, query, key, self.q_norm, self.k_norm)
        output, _ = self.o_proj(self.attn(query, key, value))
        return output


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
        self.index_dim = msa.index_dim
        self.index_q_norm = GemmaRMSNorm(msa.index_dim, eps=config.rms_norm_eps)
        self.index_k_norm = GemmaRMSNorm(msa.index_dim, eps=config.rms_norm_eps)
        model_dtype = vllm_config.model_config.dtype
        index_dtype = vllm_config.attention_config.indexer_kv_dtype
        self.attn = MSAAttention(
            self.num_heads,
            self.num_kv_heads,
            self.scale,
            msa,
            f"{prefix}.attn",
            dtype=kv_cache_dtype_str_to_dtype(vllm_config.cache_config.cache_dtype, vllm_config.model_config),
            index_dtype=torch.bfloat16 if index_dtype == "bf16" else model_dtype,
        )

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        projected, _ = self.qkv_proj(hidden_states)
        if self.attn.is_triton:
            output, _ = self.o_proj(self.attn.forward_projected(projected, positions, self._norm_rope()))
            return output
        kv_size = self.num_kv_heads * self.head_dim
        index_size = self.num_kv_heads * self.index_dim
        query, key, value, index_query, index_key = projected.split(
            [self.num_heads * self.head_dim, kv_size, kv_size, index_size, self.index_dim], dim=-1
        )
        query, key = self._norm_and_rotate(positions, query, key, self.q_norm, self.k_norm)
        index_query, index_key = self._norm_and_rotate(
            positions, index_query, index_key, self.index_q_norm, self.index_k_norm
        )
        output, _ = self.o_proj(self.attn(query, key, value, index_query, index_key))
        return output

    def _norm_rope(self) -> NormRope:
        return NormRope(
            self.rotary_emb.cos_sin_cache,
            self.q_norm.weight,
            self.k_norm.weight,
            self.index_q_norm.weight,
            self.index_k_norm.weight,
            self.q_norm.variance_epsilon,
        )
