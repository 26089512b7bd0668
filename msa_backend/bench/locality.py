"""How far neighbouring tokens choose the same blocks: made in the index queries, and measured in a selection.

Each index head's queries form a chain along a sequence: a query is the one before it times a cosine, plus noise of its
own, so that all are as long as random ones. Keys stay random. A cosine of 0 is the worst case for kernels that read a
block once for several tokens: neighbours then agree by chance alone.

Live MiniMax-M3 (vllm-project/vllm 55372, 160 samples while serving; 52963 says the same of prefill): four consecutive
tokens choose 22 distinct blocks of 64. :func:`calibrated_cosine` makes random keys agree with that. How popular single
blocks are in the model, and what more than four tokens choose, is not published; here both follow from the chain.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from msa_backend.bench.cases import BLOCK_SIZE, CALIBRATED, Case

NEIGHBOURS = 4
# Two terms of 1 - cosine, fitted to what bisection gave for 24 to 8,192 blocks at top-k 16 and dim 128. By our own
# selection on a CPU: 21.1 distinct blocks at 3K tokens, 22.1 at 4K, 22.2 at 8K, 21.7 from 32K to 128K, 22.1 at 512K,
# 22.0 at 1M. It is no sharp optimum: 1 - cosine greater by 30 % adds 0.7.
AT_LENGTH = 0.0042
"""At long contexts, where many blocks score almost as well as those chosen."""
AT_START = 0.4
"""Over the blocks left out: where few are, neighbours have little to disagree about."""


def calibrated_cosine(blocks: Tensor, topk: int) -> Tensor:
    """Between a token's index query and the one before, such that four neighbours choose 22 distinct blocks of 64.

    Args:
        blocks: that the token sees; any shape and dtype.
        topk: blocks it chooses. Calibrated for 16.

    Returns:
        fp32 of the same shape; 0 where all blocks are chosen anyway.
    """
    left_out = (blocks - topk).float()
    cosine = 1 - AT_LENGTH - AT_START / left_out.clamp(min=1)
    return torch.where(left_out > 0, cosine, 0.0)


def index_queries(case: Case, rng: torch.Generator, device: torch.device) -> Tensor:
    """``[num_tokens, num_index_heads, dim]`` fp32."""
    shape = (case.batch, case.new_tokens, case.num_kv_heads, case.dim)
    noise = torch.randn(shape, generator=rng, device=device)
    lengths = torch.tensor(case.lengths, device=device)[:, None]
    position = lengths - case.new_tokens + torch.arange(case.new_tokens, device=device)
    if case.locality == CALIBRATED:
        cosine = calibrated_cosine(position // BLOCK_SIZE + 1, case.topk)
    else:
        cosine = torch.full(position.shape, float(case.locality), device=device)
    return chain(noise, cosine).flatten(0, 1)


def chain(noise: Tensor, cosine: Tensor) -> Tensor:
    """``x[t] = cosine[t] * x[t - 1] + sqrt(1 - cosine[t] ** 2) * noise[t]``, and ``x[0] = noise[0]``.

    Args:
        noise: ``[num_seqs, num_tokens, num_heads, dim]``, standard normal; so is what comes of it.
        cosine: ``[num_seqs, num_tokens]``.
    """
    factor = cosine.clone()[..., None, None]
    factor[:, 0] = 0
    x = noise * (1 - factor.square()).sqrt()
    # Sums of 1, 2, 4, ... terms: a loop over the tokens would launch thousands of kernels.
    step = 1
    while step < x.shape[1]:
        x[:, step:] = x[:, step:] + factor[:, step:] * x[:, :-step]
        factor[:, step:] = factor[:, step:] * factor[:, :-step]
        step *= 2
    return x


class Neighbours(NamedTuple):
    """What consecutive tokens of a sequence chose, on average over groups of them and KV heads."""

    tokens: int
    """In a group: four, or the sequence's new tokens if those are fewer."""
    distinct: float
    """Blocks that any of them chose."""
    chosen: float
    """Blocks that each of them chose, summed."""


def neighbours(block_ids: Tensor, case: Case) -> Neighbours | None:
    """Of a selection ``[num_kv_heads, num_tokens, topk]``; None where a token has no neighbour."""
    tokens = min(NEIGHBOURS, case.new_tokens)
    if tokens == 1:
        return None
    ids = block_ids.unflatten(1, (case.batch, case.new_tokens))
    ids = ids[:, :, : case.new_tokens // tokens * tokens].unflatten(2, (-1, tokens)).flatten(3)
    return Neighbours(tokens, float(distinct(ids).float().mean()), float((ids >= 0).sum(-1).float().mean()))


def distinct(ids: Tensor) -> Tensor:
    """How many different ones are in the last axis, -1 not counted; int64 of the other axes."""
    ids = ids.sort(-1).values
    return (ids[..., 0] >= 0).long() + (ids[..., 1:] != ids[..., :-1]).sum(-1)
