"""The class SGLang instantiates for a MiniMax-M3 architecture, but for its name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead
from torch import nn

from msa_backend.sglang.in_place import require_in_place
from msa_backend.sglang.model_config import recorded

from .decoder import M3Model
from .load import load_weights

if TYPE_CHECKING:
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput
    from sglang.srt.layers.quantization.base_config import QuantizationConfig
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class MiniMaxM3ForCausalLM(nn.Module):
    """MiniMax-M3's text model with its language head.

    Also serves the text half of ``MiniMaxM3SparseForConditionalGeneration``; vision weights are passed over.
    """

    packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "index_qk_proj": ["index_q_proj", "index_k_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, config: Any, quant_config: QuantizationConfig | None = None, prefix: str = "") -> None:
        super().__init__()
        require_in_place()
        self.config = config
        self.quant_config = quant_config
        self.m3_config = recorded(config)
        dot = f"{prefix}." if prefix else ""
        self.model = M3Model(self.m3_config, quant_config, f"{dot}model")
        self.lm_head = (
            self.model.embed_tokens
            if self.m3_config.tie_word_embeddings
            else ParallelLMHead(
                self.m3_config.vocab_size,
                self.m3_config.hidden_size,
                quant_config=quant_config,
                prefix=f"{dot}lm_head",
            )
        )
        self.logits_processor = LogitsProcessor(getattr(config, "text_config", config))

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        input_embeds: torch.Tensor | None = None,
    ) -> LogitsProcessorOutput:
        hidden_states = self.model(input_ids, positions, forward_batch, input_embeds)
        return self.logits_processor(input_ids, hidden_states, self.lm_head, forward_batch)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return load_weights(self, weights, self.m3_config)
