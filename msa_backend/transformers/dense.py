"""Dense attention a few whole rows at a time: what a selection is measured by, and never a ``[T, T]`` matrix."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

MAX_ELEMENTS = 1 << 25
"""Of a tile's logits: 128 MB of fp32."""


def tiles(num_tokens: int, num_heads: int, seq_len: int) -> Iterator[slice]:
    """Cut query tokens so that the logits of each part, ``num_heads * tokens * seq_len``, stay in bounds."""
    at_a_time = max(1, MAX_ELEMENTS // (num_heads * seq_len))
    for start in range(0, num_tokens, at_a_time):
        yield slice(start, min(start + at_a_time, num_tokens))


def probabilities(q: Tensor, k: Tensor, positions: Tensor, scale: float) -> Tensor:
    """Causal softmax over the whole sequence.

    Args:
        q: ``[num_heads, n, head_dim]``.
        k: ``[num_kv_heads, seq_len, head_dim]`` fp32.
        positions: ``[n]`` of the query tokens in the sequence.

    Returns:
        ``[num_kv_heads, group, n, seq_len]`` fp32.
    """
    num_kv_heads, seq_len, _ = k.shape
    rows = (q.float() * scale).unflatten(0, (num_kv_heads, -1))
    logits = torch.bmm(rows.flatten(1, 2), k.mT).unflatten(1, rows.shape[1:3])
    logits.masked_fill_(unseen(positions, seq_len), -torch.inf)
    weights = logits.sub_(logits.amax(-1, keepdim=True)).exp_()  # in place: the tile is the largest thing there is
    return weights.div_(weights.sum(-1, keepdim=True))


def unseen(positions: Tensor, seq_len: int) -> Tensor:
    """``[n, seq_len]`` bool: a query sees the tokens up to its own."""
    return torch.arange(seq_len, device=positions.device) > positions[:, None]


def attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float) -> Tensor:
    """The output of a dense layer.

    Args:
        q: ``[num_heads, n, head_dim]``.
        k, v: ``[num_kv_heads, seq_len, head_dim]``.

    Returns:
        ``[n, num_heads, head_dim]`` in the dtype of ``q``.
    """
    k, v = k.float(), v.float()
    out = torch.empty(q.shape[1], q.shape[0], q.shape[2], dtype=q.dtype, device=q.device)
    for tile in tiles(q.shape[1], q.shape[0], k.shape[1]):
        p = probabilities(q[:, tile], k, positions[tile], scale)
        out[tile] = torch.bmm(p.flatten(1, 2), v).unflatten(1, p.shape[1:3]).flatten(0, 1).transpose(0, 1).to(q.dtype)
    return out
