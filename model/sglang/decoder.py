"""One decoder layer, and the stack of them with the embedding before and the norm after."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from sglang.srt.layers.layernorm import GemmaRMSNorm
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from torch import nn

from ..config import M3Config
from .attention import M3DenseAttention, M3SparseAttention
from .mlp import M3MLP, M3MoE

if TYPE_CHECKING:
    from sglang.srt.layers.quantization.base_config import QuantizationConfig
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class M3DecoderLayer(nn.Module):
    """Norm, attention, norm, MLP; the residual runs beside them and is added inside the norms."""

    def __init__(self, config: M3Config, index: int, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        attention = M3SparseAttention if config.msa.sparse_layers[index] else M3DenseAttention
        self.self_attn = attention(config, index, quant_config, f"{prefix}.self_attn")
        # Under two names, as in the checkpoint: weights then load by name alone.
        self.is_moe = config.moe_layers[index]
        if self.is_moe:
            self.block_sparse_moe = M3MoE(config, index, quant_config, f"{prefix}.block_sparse_moe")
        else:
            self.mlp = M3MLP(config, config.dense_intermediate_size, quant_config, f"{prefix}.mlp")
        self.input_layernorm = GemmaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = GemmaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        forward_batch: ForwardBatch,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions, hidden_states, forward_batch)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        feed_forward = self.block_sparse_moe if self.is_moe else self.mlp
        return feed_forward(hidden_states), residual


class M3Model(nn.Module):
    """Embedding, decoder layers, final norm."""

    def __init__(self, config: M3Config, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=f"{prefix}.embed_tokens"
        )
        self.layers = nn.ModuleList(
            M3DecoderLayer(config, index, quant_config, f"{prefix}.layers.{index}")
            for index in range(config.num_layers)
        )
        self.norm = GemmaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        input_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        hidden_states = self.embed_tokens(input_ids) if input_embeds is None else input_embeds
        residual = None
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, forward_batch, residual)
        hidden_states, _ = self.norm(hidden_states, residual)
        return hidden_states
