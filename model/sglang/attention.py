"""Attention of one layer, dense or sparse: project, norm per head, rotate, attend, project back."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from sglang.srt.layers.layernorm import GemmaRMSNorm
from sglang.srt.layers.linear import QKVParallelLinear, RowParallelLinear
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.rotary_embedding import get_rope
from sglang.srt.model_executor.forward_context import get_attn_backend
from sglang.srt.runtime_context import get_parallel
from sglang.srt.utils import is_cuda
from torch import nn

from msa_backend.kernels.api import HeadNorms

from ..config import M3Config
from ..heads import head_norms_of, split_heads
from .projection import QKVIndexProjection

if TYPE_CHECKING:
    from sglang.srt.layers.quantization.base_config import QuantizationConfig
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

FUSED_HEAD_DIM, FUSED_ROTARY_DIM = 128, 64
"""What SGLang's fused norm and rope of MiniMax-M3 is made for; in bf16, with a rope table in fp32."""


class _M3Attention(nn.Module):
    """What dense and sparse layers have in common."""

    def __init__(
        self, config: M3Config, layer: int, qkv_proj: nn.Module, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        msa = config.msa
        ranks = get_parallel().tp_size
        self.head_dim = msa.head_dim
        self.num_heads = msa.num_heads // ranks
        # Fewer KV heads than ranks: each is replicated on several.
        self.num_kv_heads = max(1, msa.num_kv_heads // ranks)
        self.qkv_proj = qkv_proj
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


class M3DenseAttention(_M3Attention):
    """Full causal attention, through the backend that serves the dense layers."""

    def __init__(self, config: M3Config, layer: int, quant_config: QuantizationConfig | None, prefix: str) -> None:
        msa = config.msa
        qkv_proj = QKVParallelLinear(
            config.hidden_size,
            msa.head_dim,
            msa.num_heads,
            msa.num_kv_heads,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        super().__init__(config, layer, qkv_proj, quant_config, prefix)
        # One launch for two norms and a rope, as SGLang's own M3 has it.
        self.fused = (
            is_cuda()
            and (msa.head_dim, config.rotary_dim) == (FUSED_HEAD_DIM, FUSED_ROTARY_DIM)
            and self.q_norm.weight.dtype == torch.bfloat16
        )

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: ForwardBatch
    ) -> torch.Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        if self.fused:
            self._norm_and_rotate_in_place(positions, qkv)
        query, key, value = split_heads(self, qkv, positions, is_rotated=self.fused)
        output, _ = self.o_proj(self.attn(query, key, value, forward_batch))
        return output

    def _norm_and_rotate_in_place(self, positions: torch.Tensor, qkv: torch.Tensor) -> None:
        from sglang.kernels.ops.attention.minimax_qknorm_rope import minimax_qknorm_rope

        minimax_qknorm_rope(
            qkv,
            self.q_norm.weight,
            self.k_norm.weight,
            self.rotary_emb.cos_sin_cache,
            positions,
            self.num_heads,
            self.num_kv_heads,
            self.num_kv_heads,
            self.q_norm.variance_epsilon,
        )


class M3SparseAttention(_M3Attention):
    """Attention over the blocks that the index branch picks. One projection feeds both branches."""

    def __init__(self, config: M3Config, layer: int, quant_config: QuantizationConfig | None, prefix: str) -> None:
        msa = config.msa
        qkv_proj = QKVIndexProjection(config, quant_config, f"{prefix}.qkv_proj")
        super().__init__(config, layer, qkv_proj, quant_config, prefix)
        self.index_q_norm = GemmaRMSNorm(msa.index_dim, eps=config.rms_norm_eps)
        self.index_k_norm = GemmaRMSNorm(msa.index_dim, eps=config.rms_norm_eps)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: ForwardBatch
    ) -> torch.Tensor:
        projected, _ = self.qkv_proj(hidden_states)
        query, index_query = get_attn_backend().norm_rope_write(
            projected, positions, self.norms, self.attn, forward_batch
        )
        _, attended = self.attn(query, None, None, forward_batch, save_kv_cache=False, idx_q=index_query)
        output, _ = self.o_proj(attended)
        return output

    @cached_property
    def norms(self) -> HeadNorms:
        return head_norms_of(self)
