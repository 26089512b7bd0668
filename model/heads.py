"""What both engines' attention does to its heads. Free of both."""

from __future__ import annotations

from torch import Tensor, nn


def norm_heads(norm: nn.Module, x: Tensor, head_dim: int) -> Tensor:
    """RMS-norm each head of ``[num_tokens, num_heads * head_dim]`` by itself; contiguous."""
    return norm(x.reshape(-1, head_dim)).view(x.shape)
