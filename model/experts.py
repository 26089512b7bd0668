"""How a MiniMax-M3 layer chooses its experts and what an expert computes, in plain torch. Free of every engine."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear


def swiglu_oai(gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """``(up + 1) * gate * sigmoid(alpha * gate)``, gate clamped from above and up from both sides.

    Args:
        gate_up: ``[..., 2 * width]``, all of gate before all of up.

    Returns:
        ``[..., width]``.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(max=limit)
    up = up.clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)


def choose_experts(router_logits: Tensor, bias: Tensor | None, topk: int, scaling: float) -> tuple[Tensor, Tensor]:
    """The experts of each token: best by sigmoid score plus a bias that only chooses, weighed by score alone.

    Args:
        router_logits: ``[num_tokens, num_experts]`` fp32.
        bias: ``[num_experts]`` fp32.

    Returns:
        ``[num_tokens, topk]`` fp32 weights, which sum to ``scaling``, and ``[num_tokens, topk]`` int64 experts.
    """
    scores = router_logits.sigmoid()
    experts = (scores if bias is None else scores + bias).topk(topk, dim=-1, sorted=False).indices
    weights = scores.gather(1, experts)
    return weights / weights.sum(dim=-1, keepdim=True) * scaling, experts


def run_experts(
    x: Tensor, weights: Tensor, experts: Tensor, gate_up: Tensor, down: Tensor, alpha: float, limit: float
) -> Tensor:
    """The weighed sum of each token's experts, one expert at a time.

    Args:
        x: ``[num_tokens, hidden]``.
        weights, experts: ``[num_tokens, topk]``, as :func:`choose_experts` returns them.
        gate_up: ``[num_experts, 2 * width, hidden]``.
        down: ``[num_experts, hidden, width]``.

    Returns:
        ``[num_tokens, hidden]`` in ``x``'s dtype, summed in fp32.
    """
    out = torch.zeros_like(x, dtype=torch.float32)
    for expert in experts.unique().tolist():
        token, slot = torch.where(experts == expert)
        activated = swiglu_oai(linear(x[token], gate_up[expert]), alpha, limit)
        out.index_add_(0, token, linear(activated, down[expert]).float() * weights[token, slot, None])
    return out.to(x.dtype)
