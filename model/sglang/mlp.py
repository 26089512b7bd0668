"""The dense MLP, and the mixture of experts around SGLang's fused expert layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from sglang.srt.distributed import tensor_model_parallel_all_reduce
from sglang.srt.layers.linear import MergedColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from sglang.srt.layers.moe.ep_moe.layer import get_moe_impl_class
from sglang.srt.layers.moe.topk import TopK
from sglang.srt.runtime_context import get_parallel
from sglang.srt.utils import is_cpu
from torch import nn

from ..config import M3Config
from ..experts import swiglu_oai
from .cpu_experts import CpuExperts

if TYPE_CHECKING:
    from sglang.srt.layers.quantization.base_config import QuantizationConfig


class M3MLP(nn.Module):
    """``down((up + 1) * gate * sigmoid(alpha * gate))``, gate and up clamped (SwiGLU-OAI)."""

    def __init__(
        self,
        config: M3Config,
        width: int,
        quant_config: QuantizationConfig | None,
        prefix: str,
        *,
        reduce_results: bool = True,
    ) -> None:
        super().__init__()
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
        self.alpha, self.limit = config.swiglu_alpha, config.swiglu_limit

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate_up, _ = self.gate_up_proj(hidden_states)
        output, _ = self.down_proj(swiglu_oai(gate_up, self.alpha, self.limit))
        return output


class M3MoE(nn.Module):
    """Top-k of sigmoid scores (plus a bias that only chooses), renormalised and scaled; one shared expert."""

    def __init__(self, config: M3Config, layer: int, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        # The router decides in fp32 whatever the model's dtype: near ties would otherwise fall by rounding.
        self.gate = ReplicatedLinear(
            config.hidden_size,
            config.num_experts,
            bias=False,
            params_dtype=torch.float32,
            quant_config=None,
            prefix=f"{prefix}.gate",
        )
        self.e_score_correction_bias = (
            nn.Parameter(torch.zeros(config.num_experts, dtype=torch.float32)) if config.use_routing_bias else None
        )
        self.shared_experts = (
            M3MLP(
                config,
                config.shared_intermediate_size,
                quant_config,
                f"{prefix}.shared_experts",
                reduce_results=False,  # routed and shared experts are summed first and reduced once
            )
            if config.shared_intermediate_size
            else None
        )
        self.on_cpu = is_cpu()
        if self.on_cpu:
            self.experts = CpuExperts(config)
            return
        self.experts = get_moe_impl_class(quant_config)(
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            layer_id=layer,
            reduce_results=False,
            quant_config=quant_config,
            activation="silu",
            gemm1_alpha=config.swiglu_alpha,
            gemm1_beta=1.0,
            gemm1_clamp_limit=config.swiglu_limit,
            gate_up_interleaved=False,
            prefix=f"{prefix}.experts",
        )
        self.topk = TopK(
            top_k=config.num_experts_per_tok,
            renormalize=True,
            layer_id=layer,
            scoring_func="sigmoid",
            correction_bias=self.e_score_correction_bias,
            routed_scaling_factor=config.routed_scaling_factor,
            apply_routed_scaling_factor_on_output=True,
        )
        self.topk.bind_runner_backend(self.experts.runner_backend)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        router_logits, _ = self.gate(hidden_states.float())
        # First, because SGLang's fused experts write their output over their input.
        shared = None if self.shared_experts is None else self.shared_experts(hidden_states)
        if self.on_cpu:
            output = self.experts(hidden_states, router_logits, self.e_score_correction_bias)
        else:
            output = self.experts(hidden_states, self.topk(hidden_states, router_logits))
        if shared is not None:
            output = output + shared
        return tensor_model_parallel_all_reduce(output) if get_parallel().tp_size > 1 else output
