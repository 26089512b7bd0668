"""The class vLLM instantiates to draft by MiniMax-M3's own MTP module (multi-token prediction)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor

from msa_backend.vllm.model_config import recorded

from ..config import M3Config
from ..mtp import module_config
from .decoder import M3DecoderLayer
from .load import load_mtp_module
from .norm import M3RMSNorm

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class M3MTPModule(nn.Module):
    """A token's embedding and the hidden state of the token before it, projected into one sparse decoder layer."""

    def __init__(self, config: M3Config, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.enorm = M3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = M3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.eh_proj = ReplicatedLinear(
            2 * config.hidden_size,
            config.hidden_size,
            bias=False,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.eh_proj",
        )
        self.transformer_layer = M3DecoderLayer(module_config(config), vllm_config, prefix)
        self.final_layernorm = M3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, embeddings: torch.Tensor, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        # As in vLLM's own class: at the first position a module knows the hidden state alone.
        embeddings = embeddings.masked_fill((positions == 0).unsqueeze(-1), 0)
        joined = torch.cat((self.enorm(embeddings), self.hnorm(hidden_states)), dim=-1)
        projected, _ = self.eh_proj(joined)
        output, residual = self.transformer_layer(positions, projected, None)
        return output + residual


class M3MTPModel(nn.Module):
    """The module that drafts. vLLM puts the target's ``embed_tokens`` beside it once both are loaded."""

    embed_tokens: nn.Module

    def __init__(self, config: M3Config, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        # The first alone: vLLM runs it for every draft token, and does not say which it is at. And not under the
        # target's names: both models' attention layers are found by name in one table.
        self.layers = nn.ModuleList([M3MTPModule(config, vllm_config, f"{prefix}.0")])


class MiniMaxM3MTP(nn.Module):
    """MiniMax-M3's first MTP module, with the target's embedding and language head, which vLLM hands over."""

    packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj", "index_q_proj", "index_k_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    lm_head: nn.Module

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.m3_config = config = recorded(vllm_config)
        self.model = M3MTPModel(config, vllm_config, f"{prefix}mtp.layers")
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        intermediate_tensors: object = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            input_ids: ``[num_tokens]``; None where ``inputs_embeds`` are given.
            positions: ``[num_tokens]`` int64, of the tokens before those of ``input_ids``.
            hidden_states: ``[num_tokens, hidden_size]`` at ``positions``: the target's after its final norm, or what
                this returned for the draft token before.
            inputs_embeds: ``[num_tokens, hidden_size]`` of the tokens.

        Returns:
            ``[num_tokens, hidden_size]`` before the module's final norm.
        """
        embeddings = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        (module,) = self.model.layers
        return module(embeddings, positions, hidden_states)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        (module,) = self.model.layers
        return self.logits_processor(self.lm_head, module.final_layernorm(hidden_states))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return load_mtp_module(self, weights, self.m3_config)
