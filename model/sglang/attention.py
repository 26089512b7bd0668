"""Attention of one layer, dense or sparse: project, norm per head, rotate, attend, project back."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from sglang.srt.layers.layernorm import GemmaRMSNorm
from sglang.srt.layers.linear import QKVParallelLinear, ReplicatedParallelGroup, RowParallelLinear
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.rotary_embedding import get_rope
from sglang.srt.model_executor.forward_context import get_attn_backend
from sglang.srt.runtime_context import get_parallel
from torch import nn

from msa_backend.kernels.api import HeadNorms

from ..config import M3Config
from ..heads import norm_heads

if TYPE_CHECKING:
    from sglang.srt.layers.quantization.base_config import QuantizationConfig
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class M3DenseAttention(nn.Module):
    """Full causal attention, through the backend that serves the dense layers."""

    def __init__(self, config: M3Config, layer: int, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        msa = config.msa
        ranks = get_parallel().tp_size
        self.head_dim = msa.head_dim
        self.num_heads = msa.num_heads // ranks
        # Fewer KV heads than ranks: each is replicated on several.
        self.num_kv_heads = max(1, msa.num_kv_heads // ranks)
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            msa.head_dim,
            msa.num_heads,
            msa.num_kv_heads,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            msa.num_heads * msa.head_dim,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.q_norm = GemmaRMSNorm(msa.head_dim, eps=config.rms_norm_eps)
        self.k_norm = GemmaRMSNorm(msa.head_dim, eps=config.rms_norm_eps)
        self.rotary_emb = get_rope(
            msa.head_dim,
            rotary_dim=config.rotary_dim,
            max_position=config.max_position_embeddings,
            base=config.rope_theta,
        )
        self.attn = RadixAttention(
            self.num_heads,
            msa.head_dim,
            msa.head_dim**-0.5,
            num_kv_heads=self.num_kv_heads,
            layer_id=layer,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
        )

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: ForwardBatch
    ) -> torch.Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        kv_size = self.num_kv_heads * self.head_dim
        query, key, value = qkv.split([self.num_heads * self.head_dim, kv_size, kv_size], dim=-1)
        # Contiguous, because SGLang's rope kernels write in place and the inputs are slices of one projection.
        query = norm_heads(self.q_norm, query, self.head_dim)
        key = norm_heads(self.k_norm, key, self.head_dim)
        query, key = self.rotary_emb(positions, query, key)
        output, _ = self.o_proj(self.attn(query, key, value, forward_batch))
        return output


class M3SparseAttention(M3DenseAttention):
    """Attention over the blocks that the index branch picks."""

    def __init__(self, config: M3Config, layer: int, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__(config, layer, quant_config, prefix)
        msa = config.msa
        # As many index query heads as KV heads, so they split alike; the one index key is on every rank.
        self.index_qk_proj = QKVParallelLinear(
            config.hidden_size,
            msa.index_dim,
            msa.num_index_heads,
            total_num_kv_heads=1,
            bias=False,
            quant_config=quant_config,
            v_head_size=0,
            parallel_group=ReplicatedParallelGroup("attn_tp", max(1, get_parallel().tp_size // msa.num_index_heads)),
            prefix=f"{prefix}.index_qk_proj",
        )
        self.index_q_norm = GemmaRMSNorm(msa.index_dim, eps=config.rms_norm_eps)
        self.index_k_norm = GemmaRMSNorm(msa.index_dim, eps=config.rms_norm_eps)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: ForwardBatch
    ) -> torch.Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        index, _ = self.index_qk_proj(hidden_states)
        query, index_query = get_attn_backend().norm_rope_write(
            torch.cat((qkv, index), dim=-1), positions, self.norms, self.attn, forward_batch
        )
        _, attended = self.attn(query, None, None, forward_batch, save_kv_cache=False, idx_q=index_query)
        output, _ = self.o_proj(attended)
        return output

    @cached_property
    def norms(self) -> HeadNorms:
        return HeadNorms(
            q_weight=self.q_norm.weight,
            k_weight=self.k_norm.weight,
            index_q_weight=self.index_q_norm.weight,
            index_k_weight=self.index_k_norm.weight,
            cos_sin_cache=self.rotary_emb.cos_sin_cache,
            eps=self.q_norm.variance_epsilon,
        )
