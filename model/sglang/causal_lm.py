"""The class SGLang instantiates for a MiniMax-M3 architecture, but for its name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.moe.utils import get_num_fused_shared_experts
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead
from sglang.srt.utils import is_cuda
from torch import nn

from msa_backend.sglang.in_place import require_in_place
from msa_backend.sglang.model_config import recorded

from .attention import M3SparseAttention
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
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, config: Any, quant_config: QuantizationConfig | None = None, prefix: str = "") -> None:
        super().__init__()
        require_in_place()
        self.config = config
        self.quant_config = quant_config
        self.m3_config = recorded(config)
        # Told while the model is made, and asked for again when its weights are loaded.
        self.num_fused_shared_experts = get_num_fused_shared_experts()
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

    @property
    def sparse_attention(self) -> list[M3SparseAttention]:
        """Of the layers that have it, in their order."""
        return [module for module in self.modules() if isinstance(module, M3SparseAttention)]

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
        return load_weights(self, weights, self.m3_config, self.num_fused_shared_experts)

    # SGLang asks the class, before it makes one, whether the shared expert is to run as one more of the routed ones.

    @classmethod
    def shared_experts_fusion_disable_reason(
        cls, hf_config: Any, quant_config: QuantizationConfig | None
    ) -> str | None:
        """Why it is not; None if it is."""
        config = recorded(hf_config)
        if not is_cuda():
            return "Only GPU kernels take the shared expert for a routed one."
        if config.shared_intermediate_size != config.moe_intermediate_size:
            return "The shared expert is none or of another size than the routed ones."
        if quant_config is not None:
            return "Shared and routed experts may be quantized differently."
        return None

    @classmethod
    def num_fusable_shared_experts(cls, hf_config: Any) -> int:
        """How many run so, where there is no such reason."""
        return 1
