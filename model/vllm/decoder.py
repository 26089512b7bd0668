"""One decoder layer, and the stack of them with the embedding before and the norm after."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.interfaces import EagleModelMixin
from vllm.model_executor.models.utils import PPMissingLayer, make_empty_intermediate_tensors_factory, make_layers
from vllm.sequence import IntermediateTensors

from ..config import M3Config
from .attention import M3DenseAttention, M3SparseAttention
from .mlp import M3MLP, M3MoE
from .norm import M3RMSNorm

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class M3DecoderLayer(nn.Module):
    """Norm, attention, norm, MLP; the residual runs beside them and is added inside the norms."""

    def __init__(self, config: M3Config, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        index = int(prefix.rsplit(".", 1)[-1])
        attention = M3SparseAttention if config.msa.sparse_layers[index] else M3DenseAttention
        self.self_attn = attention(config, vllm_config, f"{prefix}.self_attn")
        # Under two names, as in the checkpoint: weights then load by name alone.
        self.is_moe = config.moe_layers[index]
        if self.is_moe:
            self.block_sparse_moe = M3MoE(config, vllm_config, f"{prefix}.block_sparse_moe")
        else:
            self.mlp = M3MLP(config, config.dense_intermediate_size, vllm_config, f"{prefix}.mlp")
        self.input_layernorm = M3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = M3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions, hidden_states)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        feed_forward = self.block_sparse_moe if self.is_moe else self.mlp
        return feed_forward(hidden_states), residual


class M3Model(nn.Module, EagleModelMixin):
    """Embedding, decoder layers, final norm; under pipeline parallelism, this rank's share of them.

    For EAGLE3 also what enters the layers that vLLM names, counted from 0; one past the last is what leaves it.
    """

    def __init__(self, config: M3Config, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        pipeline = get_pp_group()
        self.embed_tokens = (
            VocabParallelEmbedding(config.vocab_size, config.hidden_size, prefix=f"{prefix}.embed_tokens")
            if pipeline.is_first_rank or (config.tie_word_embeddings and pipeline.is_last_rank)
            else PPMissingLayer()
        )
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_layers,
            lambda prefix: M3DecoderLayer(config, vllm_config, prefix),
            prefix=f"{prefix}.layers",
        )
        self.norm = (
            M3RMSNorm(config.hidden_size, eps=config.rms_norm_eps) if pipeline.is_last_rank else PPMissingLayer()
        )
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], config.hidden_size
        )

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, list[torch.Tensor]] | IntermediateTensors:
        """
        Returns:
            ``[num_tokens, hidden_size]`` after the final norm, with a list of as many for EAGLE3 if it asked for any;
            on a rank that is not the last, what the next one needs.
        """
        if intermediate_tensors is not None:
            hidden_states, residual = intermediate_tensors["hidden_states"], intermediate_tensors["residual"]
        else:
            hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            residual = None
        aux_hidden_states: list[torch.Tensor] = []
        if 0 in self.aux_hidden_state_layers:
            # A copy: without a residual to add, the first layer makes this one the residual, and norms add in place.
            aux_hidden_states.append(hidden_states.clone())
        for index, layer in enumerate(self.layers[self.start_layer : self.end_layer], self.start_layer):
            hidden_states, residual = layer(positions, hidden_states, residual)
            self._maybe_add_hidden_state(aux_hidden_states, index + 1, hidden_states, residual)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden_states, "residual": residual})
        hidden_states, _ = self.norm(hidden_states, residual)
        return (hidden_states, aux_hidden_states) if aux_hidden_states else hidden_states
