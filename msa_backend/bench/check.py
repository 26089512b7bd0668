"""A benchmark of a wrong kernel is worthless: sampled tokens of each result against fp64, on the case's own inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from msa_backend.bench.cases import BLOCK_SIZE
from msa_backend.bench.inputs import Inputs

SAMPLES = 12
DENSE_SAMPLES = 2
# fp64 numbers at once.
PIECE = 2**27

# ||out - exact|| / ||exact||. 16-bit products with fp32 sums give 2e-3, of which rounding the softmax weights to
# 16 bits is most; fp8 keys and values are exact numbers to start from and add nothing. fp32 may run as tf32.
ATTENTION_TOLERANCE = {"bf16": 1e-2, "fp16": 2e-3, "fp32": 2e-3}
# A better block was left out: by how much, over |q| |k|. fp32 sums of exact products are within dim * 2**-24;
# Hopper sums fp8 products with 14 bits, and fp32 inputs may be rounded to tf32.
SELECTION_TOLERANCE = {"bf16": 2e-5, "fp16": 2e-5, "fp32": 1e-3, "fp8": 2e-3}


class Token(NamedTuple):
    row: int
    number: int
    """In the batch."""
    visible: int


def sample(inputs: Inputs, count: int) -> Iterator[Token]:
    """First, last and some tokens in between."""
    case = inputs.case
    for i in range(min(count, case.num_tokens)):
        number = round(i * (case.num_tokens - 1) / max(1, min(count, case.num_tokens) - 1))
        row, offset = divmod(number, case.new_tokens)
        yield Token(row, number, case.lengths[row] - case.new_tokens + offset + 1)


def selection_error(block_ids: Tensor, inputs: Inputs) -> float:
    """How much better the best block left out is than the worst one taken, over |q| |k|; 0 is exact.

    Infinite where the selection breaks its contract: too few blocks, one twice, one unseen, the own block missing, an
    entry after a -1.
    """
    worst = 0.0
    for token in sample(inputs, SAMPLES):
        scores, rounding = _block_scores(token, inputs)
        for head, of_head in enumerate(scores):
            ids = block_ids[head, token.number].long()
            worst = max(worst, _shortfall(ids, of_head, inputs.case.topk) / float(rounding[head]))
    return worst


def _block_scores(token: Token, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """``[heads, blocks]`` exact scores and ``[heads]`` |q| * max |k|."""
    pages = inputs.batch.block_table[token.row, : -(-token.visible // BLOCK_SIZE)].long()
    q = inputs.index_q[token.number].double()
    scores, longest = [], 0.0
    step = max(1, PIECE // (BLOCK_SIZE * q.shape[1]))
    for first in range(0, len(pages), step):
        keys = inputs.index_k_pages[pages[first : first + step]].to(q.dtype).flatten(0, 1)
        keys = keys[: token.visible - first * BLOCK_SIZE]
        dots = q @ keys.T
        longest = max(longest, float(keys.norm(dim=1).max()))
        dots = torch.nn.functional.pad(dots, (0, -dots.shape[1] % BLOCK_SIZE), value=-torch.inf)
        scores.append(dots.unflatten(1, (-1, BLOCK_SIZE)).amax(-1))
    return torch.cat(scores, 1), q.norm(dim=1) * longest


def _shortfall(ids: Tensor, scores: Tensor, topk: int) -> float:
    blocks, own = len(scores), len(scores) - 1
    count = min(topk, blocks)
    chosen = ids[:count]
    well_formed = (chosen >= 0).all() and (chosen < blocks).all() and (ids[count:] == -1).all()
    if not well_formed or len(chosen.unique()) != count or not (chosen == own).any():
        return math.inf
    free = torch.ones_like(scores, dtype=torch.bool)
    free[own] = False
    taken = torch.zeros_like(free)
    taken[chosen] = True
    if not (free & ~taken).any() or not (free & taken).any():
        return 0.0
    return max(0.0, float(scores[free & ~taken].max() - scores[free & taken].min()))


def attention_error(out: Tensor, block_ids: Tensor | None, inputs: Inputs) -> float:
    """||out - exact|| / ||exact|| over sampled tokens; all visible blocks where ``block_ids`` is None.

    Infinite if anything in ``out`` is not a number: outputs are poisoned before.
    """
    if not out.isfinite().all():
        return math.inf
    difference = size = 0.0
    for token in sample(inputs, SAMPLES if block_ids is not None else DENSE_SAMPLES):
        for kv_head in range(inputs.case.num_kv_heads):
            ids = None if block_ids is None else block_ids[kv_head, token.number]
            exact, heads = _exact_attention(token, kv_head, ids, inputs)
            difference += float((out[token.number, heads].double() - exact).square().sum())
            size += float(exact.square().sum())
    return math.sqrt(difference / size)


def _exact_attention(token: Token, kv_head: int, ids: Tensor | None, inputs: Inputs) -> tuple[Tensor, slice]:
    case = inputs.case
    group = case.num_heads // case.num_kv_heads
    heads = slice(kv_head * group, (kv_head + 1) * group)
    if ids is None:
        blocks = torch.arange(-(-token.visible // BLOCK_SIZE), device=inputs.q.device)
    else:
        blocks = ids[ids >= 0].long()
    pages = inputs.batch.block_table[token.row].long()[blocks]
    position = (blocks[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE, device=blocks.device)).flatten()
    seen = position < token.visible
    k, v = inputs.kv_pages[pages, kv_head].flatten(0, 1)[seen].double().chunk(2, dim=-1)
    logits = inputs.q[token.number, heads].double() @ k.T * inputs.scale
    return logits.softmax(-1) @ v, heads
