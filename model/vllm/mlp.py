"""The dense MLP, and the mixture of experts around vLLM's fused expert kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from vllm.model_executor.layers.activation import SiluAndMulWithClamp
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, GateLinear
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.platforms import current_platform

from ..config import M3Config

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class M3MLP(nn.Module):
    """``down((up + 1) * gate * sigmoid(alpha * gate))``, gate and up clamped (SwiGLU-OAI)."""

    def __init__(
        self, config: M3Config, width: int, vllm_config: VllmConfig, prefix: str, *, reduce_results: bool = True
    ) -> None:
        super().__init__()
        quant_config = vllm_config.quant_config
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size, [width] * 2, bias=False, quant_config=quant_config, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(
            width,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            reduce_results=reduce_results,
            prefix=f"{prefix}.down_proj",
        )
        self.activation = SiluAndMulWithClamp(config.swiglu_limit, alpha=config.swiglu_alpha, beta=1.0)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate_up, _ = self.gate_up_proj(hidden_states)
        output, _ = self.down_proj(self.activation(gate_up))
        return output


class M3MoE(nn.Module):
    """Top-k of sigmoid scores (plus a bias that only chooses), renormalised and scaled; one shared expert."""

    def __init__(self, config: M3Config, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        quant_config = vllm_config.quant_config
        # The router decides in fp32 whatever the model's dtype: near ties would otherwise fall by rounding.
        self.gate = GateLinear(
            config.hidden_size,
            config.num_experts,
            bias=False,
            params_dtype=torch.float32,
            out_dtype=torch.float32,
            prefix=f"{prefix}.gate",
        )
        self.e_score_correction_bias = (
            nn.Parameter(torch.zeros(config.num_experts, dtype=torch.float32)) if config.use_routing_bias else None
        )
        self.shared_experts = (
            M3MLP(
                config,
                config.shared_intermediate_size,
                vllm_config,
                f"{prefix}.shared_experts",
                reduce_results=False,  # the fused layer sums routed and shared experts, then reduces once
            )
            if config.shared_intermediate_size
            else None
        )
        # The same activation under two names: vLLM's CPU kernel has it with gate and up interleaved and with
        # MiniMax-M3's constants built in, the GPU kernels with gate and up in halves. And the same routing: vLLM's
        # CPU router knows sigmoid scores in groups alone, and one group of all experts is no grouping.
        self.interleaved = on_cpu = current_platform.is_cpu()
        self.experts = FusedMoEFactory(
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            renormalize=True,
            quant_config=quant_config,
            scoring_func="sigmoid",
            routed_scaling_factor=config.routed_scaling_factor,
            e_score_correction_bias=self.e_score_correction_bias,
            use_grouped_topk=on_cpu,
            num_expert_group=1 if on_cpu else None,
            topk_group=1 if on_cpu else None,
            activation="swigluoai" if on_cpu else "swigluoai_uninterleave",
            swiglu_limit=config.swiglu_limit,
            swiglu_alpha=config.swiglu_alpha,
            swiglu_beta=1.0,
            router_logits_dtype=torch.float32,
            shared_experts=self.shared_experts,
            prefix=f"{prefix}.experts",
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        router_logits, _ = self.gate(hidden_states)
        return self.experts(hidden_states=hidden_states, router_logits=router_logits)

    def finish_loading(self) -> None:
        """Bring the loaded gate and up rows into the order the platform's kernel reads. Call once."""
        if not self.interleaved:
            return
        for name, weight in self.experts.named_parameters():
            if name.endswith("w13_weight"):
                gate, up = weight.data.chunk(2, dim=1)
                weight.data.copy_(torch.stack((gate, up), dim=2).flatten(1, 2))
