"""The dense MLP, and the mixture of experts around SGLang's fused expert layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from sglang.srt.distributed import tensor_model_parallel_all_reduce
from sglang.srt.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from sglang.srt.layers.moe.ep_moe.layer import get_moe_impl_class
from sglang.srt.layers.moe.topk import TopK
from sglang.srt.layers.moe.utils import get_num_fused_shared_experts
from sglang.srt.runtime_context import get_parallel
from sglang.srt.utils import is_cpu, is_cuda
from torch import nn

from ..config import M3Config
from ..experts import swiglu_oai
from .cpu_experts import CpuExperts
from .router import Router

if TYPE_CHECKING:
    from collections.abc import Callable

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
        self.swiglu = _swiglu()
        self.alpha, self.limit = config.swiglu_alpha, config.swiglu_limit

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate_up, _ = self.gate_up_proj(hidden_states)
        output, _ = self.down_proj(self.swiglu(gate_up, self.alpha, self.limit))
        return output


def _swiglu() -> Callable[[torch.Tensor, float, float], torch.Tensor]:
    """``swiglu_oai``; on a GPU in one kernel, which SGLang has compiled for its experts as well."""
    if not is_cuda():
        return swiglu_oai
    from sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe import swiglu_no_interleaved_with_alpha_and_limit

    return swiglu_no_interleaved_with_alpha_and_limit


class M3MoE(nn.Module):
    """Top-k of sigmoid scores (plus a bias that only chooses), renormalised and scaled; one shared expert."""

    def __init__(self, config: M3Config, layer: int, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.gate = Router(config, f"{prefix}.gate")
        self.e_score_correction_bias = (
            nn.Parameter(torch.zeros(config.num_experts, dtype=torch.float32)) if config.use_routing_bias else None
        )
        # As one more of the routed experts, which every token takes.
        fused = get_num_fused_shared_experts()
        self.shared_experts = (
            M3MLP(
                config,
                config.shared_intermediate_size,
                quant_config,
                f"{prefix}.shared_experts",
                reduce_results=False,  # routed and shared experts are summed first and reduced once
            )
            if config.shared_intermediate_size and not fused
            else None
        )
        self.on_cpu = is_cpu()
        if self.on_cpu:
            self.experts = CpuExperts(config)
            return
        self.experts = get_moe_impl_class(quant_config)(
            num_experts=config.num_experts + fused,
            num_fused_shared_experts=fused,
            top_k=config.num_experts_per_tok + fused,
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
        bias = self.e_score_correction_bias
        if bias is None:  # SGLang's choice of experts on a GPU asks for one; zeros choose as none does
            bias = torch.zeros(config.num_experts, dtype=torch.float32)
        self.topk = TopK(
            top_k=config.num_experts_per_tok,
            renormalize=True,
            layer_id=layer,
            scoring_func="sigmoid",
            correction_bias=bias,
            routed_scaling_factor=config.routed_scaling_factor,
            apply_routed_scaling_factor_on_output=True,
        )
        self.topk.bind_runner_backend(self.experts.runner_backend)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        router_logits = self.gate(hidden_states)
        # First, because SGLang's fused experts write their output over their input.
        shared = None if self.shared_experts is None else self.shared_experts(hidden_states)
        if self.on_cpu:
            output = self.experts(hidden_states, router_logits, self.e_score_correction_bias)
        else:
            output = self.experts(hidden_states, self.topk(hidden_states, router_logits))
        if shared is not None:
            output = output + shared
        return tensor_model_parallel_all_reduce(output) if get_parallel().tp_size > 1 else output

    def finish_loading(self) -> None:
        """Prepare what is computed from the weights. Call whenever they were loaded."""
        self.gate.finish_loading()
