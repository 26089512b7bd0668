"""How much a token would have of each expert, in fp32 whatever the model's dtype."""

from __future__ import annotations

import torch
from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.utils import get_device_sm, is_cuda

from ..config import M3Config

FEW_TOKENS = 16
"""As many as SGLang's kernel for few rows is made for; with more, cuBLAS is faster."""


class Router(ReplicatedLinear):
    """``hidden_states @ weight.T`` of fp32 weights: near ties would otherwise fall by rounding.

    A GPU multiplies fp32 slowly, and bf16 fast while it still sums in fp32. So for a bf16 model the weights are cut
    into bf16 parts that add up to them: ``x @ w = x @ high + x @ middle + x @ low``, in one product of three times the
    rows. Weights that are bf16 already have but one part.
    """

    def __init__(self, config: M3Config, prefix: str) -> None:
        super().__init__(
            config.hidden_size,
            config.num_experts,
            bias=False,
            params_dtype=torch.float32,
            quant_config=None,
            prefix=prefix,
        )
        self.cuts = is_cuda() and torch.get_default_dtype() == torch.bfloat16
        self.parts: torch.Tensor | None = None
        self.few_tokens = FEW_TOKENS if self.cuts and _has_kernel_for_few(config) else 0

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``[num_tokens, num_experts]`` fp32."""
        if 0 < hidden_states.shape[0] <= self.few_tokens:
            from sglang.kernels.ops.gemm.tiny_gemm import tiny_gemm_bf16

            return tiny_gemm_bf16(hidden_states, self.weight, out_dtype=torch.float32, max_m=self.few_tokens)
        if self.parts is None:
            logits, _ = super().forward(hidden_states.float())
            return logits
        products = torch.mm(hidden_states, self.parts.t(), out_dtype=torch.float32)
        count = products.shape[1] // self.output_size
        return products if count == 1 else products.unflatten(1, (count, -1)).sum(1)

    def finish_loading(self) -> None:
        """Cut the loaded weights. Call whenever they were loaded."""
        if not self.cuts:
            return
        parts = torch.cat(bf16_parts(self.weight.data))
        if self.parts is not None and self.parts.shape == parts.shape:
            self.parts.copy_(parts)  # where graphs read them
        else:
            self.parts = parts


def bf16_parts(weight: torch.Tensor) -> list[torch.Tensor]:
    """One to three bf16 tensors whose sum is the fp32 ``weight``, to the last bit but for numbers near the smallest."""
    parts, rest = [weight.bfloat16()], weight - weight.bfloat16().float()
    while rest.any() and len(parts) < 3:
        parts.append(rest.bfloat16())
        rest = rest - parts[-1].float()
    return parts


def _has_kernel_for_few(config: M3Config) -> bool:
    if get_device_sm() < 90:
        return False
    from sglang.kernels.ops.gemm.tiny_gemm import can_use_tiny_gemm

    # Its fp32 weights are those of fewer experts than channels.
    return config.num_experts < config.hidden_size and can_use_tiny_gemm(
        config.num_experts, config.hidden_size, FEW_TOKENS
    )
