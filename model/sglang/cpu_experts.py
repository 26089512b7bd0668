"""The routed experts on a CPU."""

from __future__ import annotations

import torch
from sglang.srt.runtime_context import get_parallel
from torch import nn

from ..config import M3Config
from ..experts import choose_experts, run_experts


class CpuExperts(nn.Module):
    """One rank's share of every expert, in plain torch.

    SGLang's own layer has two paths on a CPU. One needs AMX and SGLang's compiled kernels, and packs the weights for
    them; the other takes gate and up for interleaved, and compiles C++ at the first step.
    """

    def __init__(self, config: M3Config) -> None:
        super().__init__()
        self.config = config
        self.width = config.moe_intermediate_size // get_parallel().tp_size
        shape = config.num_experts, 2 * self.width, config.hidden_size
        self.w13_weight = nn.Parameter(torch.empty(shape), requires_grad=False)
        self.w2_weight = nn.Parameter(torch.empty(shape[0], shape[2], self.width), requires_grad=False)
        for weight in (self.w13_weight, self.w2_weight):
            weight.weight_loader = self._load

    def forward(self, x: torch.Tensor, router_logits: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``[num_tokens, hidden]``: this rank's part of the weighed sum of each token's experts."""
        config = self.config
        weights, experts = choose_experts(router_logits, bias, config.num_experts_per_tok, config.routed_scaling_factor)
        return run_experts(
            x, weights, experts, self.w13_weight, self.w2_weight, config.swiglu_alpha, config.swiglu_limit
        )

    def _load(self, weight: nn.Parameter, tensor: torch.Tensor, name: str, shard_id: str, expert_id: int) -> None:
        """Take this rank's rows of gate (w1) or up (w3), or its columns of down (w2)."""
        mine = slice(get_parallel().tp_rank * self.width, (get_parallel().tp_rank + 1) * self.width)
        if shard_id == "w2":
            weight.data[expert_id].copy_(tensor[:, mine])
        else:
            half = weight.data[expert_id].chunk(2)[0 if shard_id == "w1" else 1]
            half.copy_(tensor[mine])
