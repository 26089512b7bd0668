"""Score, then choose. A step whose scores would take too much memory is cut."""

from __future__ import annotations

import torch
from torch import Tensor

from ..batch import BLOCK_SIZE, Batch
from ..caches import LayerCaches
from ..selection import Selection
from . import score
from .launch import Launch, run
from .pages import check_dim
from .plan import Plan, Shape, plan_of
from .prefill.slices import slices
from .sizes import ceil_div
from .topk import select_topk

MAX_SCORE_BYTES = 1 << 30
"""Block scores held at a time: those of 8,192 tokens and 4 heads at a context of 1M."""


def select_blocks(index_q: Tensor, caches: LayerCaches, batch: Batch, selection: Selection) -> Tensor:
    """See :func:`msa_backend.kernels.api.select_blocks`; ``index_dim`` a power of two from 16 to 128."""
    check_dim("index_dim", caches.index_dim)
    num_tokens, num_heads, _ = index_q.shape
    index_q = score.multiplicable(index_q)
    block_ids = index_q.new_empty(num_heads, num_tokens, selection.topk, dtype=torch.int32)
    parts = slices(batch, num_tokens, tokens_at_a_time(batch, num_tokens, num_heads, selection))
    for part in parts:
        here = index_q[part.tokens]
        scoring = scoring_of(here, caches, part.batch, selection)
        plan = plan_of(part.batch, selecting_shape(here, selection, scoring))
        into = block_ids if len(parts) == 1 else torch.empty_like(block_ids[:, part.tokens])
        run(selecting(here, caches, part.batch, selection, plan, scoring, into))
        if into is not block_ids:
            block_ids[:, part.tokens] = into
    return block_ids


def selecting(
    index_q: Tensor,
    caches: LayerCaches,
    batch: Batch,
    selection: Selection,
    plan: Plan,
    scoring: score.Config | None,
    block_ids: Tensor,
) -> list[Launch]:
    """The launches that fill ``block_ids``, ``[num_index_heads, num_tokens, topk]`` int32, by a plan made for them."""
    if not block_ids.numel():
        return []
    if scoring is None:
        return [select_topk(None, batch, selection, plan, block_ids)]
    scores, score_launch = score.score_blocks(index_q, caches, batch, selection, plan, scoring)
    return [score_launch, select_topk(scores, batch, selection, plan, block_ids)]


def scoring_of(index_q: Tensor, caches: LayerCaches, batch: Batch, selection: Selection) -> score.Config | None:
    """How a step is scored; None if no token may see more blocks than are taken anyway."""
    return score.config_of(index_q, caches, batch) if _needs_scores(batch, selection) else None


def tokens_at_a_time(batch: Batch, num_tokens: int, num_heads: int, selection: Selection) -> int:
    """How many tokens' scores fit in memory."""
    if not _needs_scores(batch, selection):
        return max(1, num_tokens)
    return max(1, MAX_SCORE_BYTES // (4 * num_heads * ceil_div(batch.max_seq_len, BLOCK_SIZE)))


def _needs_scores(batch: Batch, selection: Selection) -> bool:
    return batch.max_seq_len > selection.topk * BLOCK_SIZE


def selecting_shape(index_q: Tensor, selection: Selection, scoring: score.Config | None) -> Shape:
    """A plan for selection alone."""
    num_tokens, num_heads, _ = index_q.shape
    return Shape(
        num_tokens=num_tokens,
        num_kv_heads=num_heads,
        topk=selection.topk,
        score_own=selection.local_blocks == 0,
        score_tile_tokens=0 if scoring is None else score.tile_tokens(scoring, num_heads),
        score_programs=0 if scoring is None else score.programs(scoring, index_q.device),
    )
