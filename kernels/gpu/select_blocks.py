"""Score, then choose. A step whose scores would take too much memory is cut."""

from __future__ import annotations

import torch
from torch import Tensor

from ..batch import BLOCK_SIZE, Batch
from ..caches import LayerCaches
from ..selection import Selection
from ..share import ALL, Share
from . import score
from .launch import Launch, run
from .pages import check_dim
from .plan import Plan, Shape, plan_of
from .prefill.slices import slices
from .sizes import ceil_div
from .topk import select_topk
from .topk_of_share import merge_topk, topk_of_share

MAX_SCORE_BYTES = 1 << 30
"""Block scores held at a time: those of 8,192 tokens and 4 heads at a context of 1M."""


def select_blocks(index_q: Tensor, caches: LayerCaches, batch: Batch, selection: Selection) -> Tensor:
    """See :func:`msa_backend.kernels.api.select_blocks`; ``index_dim`` a power of two from 16 to 128."""
    num_tokens, num_heads, _ = index_q.shape
    block_ids = index_q.new_empty(num_heads, num_tokens, selection.topk, dtype=torch.int32)
    return _select(index_q, caches, batch, selection, ALL, block_ids)


def select_candidates(index_q: Tensor, caches: LayerCaches, batch: Batch, selection: Selection, share: Share) -> Tensor:
    """See :func:`msa_backend.kernels.api.select_candidates`; ``index_dim`` a power of two from 16 to 128."""
    num_tokens, num_heads, _ = index_q.shape
    candidates = index_q.new_empty(2, num_heads, num_tokens, selection.topk, dtype=torch.int32)
    return _select(index_q, caches, batch, selection, share, candidates)


def merge_candidates(candidates: Tensor, batch: Batch, selection: Selection) -> Tensor:
    """See :func:`msa_backend.kernels.api.merge_candidates`."""
    _, _, num_heads, num_tokens, topk = candidates.shape
    block_ids = candidates.new_empty(num_heads, num_tokens, topk)
    if block_ids.numel():
        plan = plan_of(batch, Shape(num_tokens=num_tokens, num_kv_heads=num_heads, topk=topk))
        run([merge_topk(candidates, batch, selection, plan, block_ids)])
    return block_ids


def _select(
    index_q: Tensor, caches: LayerCaches, batch: Batch, selection: Selection, share: Share, found: Tensor
) -> Tensor:
    """Fill ``found``, whose last but one axis are the tokens, as :func:`selecting` does; in pieces if need be."""
    check_dim("index_dim", caches.index_dim)
    num_tokens, num_heads, _ = index_q.shape
    index_q = score.multiplicable(index_q)
    parts = slices(batch, num_tokens, tokens_at_a_time(batch, num_tokens, num_heads, selection))
    for part in parts:
        here = index_q[part.tokens]
        scoring = scoring_of(here, caches, part.batch, selection)
        plan = plan_of(part.batch, selecting_shape(here, selection, scoring, share))
        into = found if len(parts) == 1 else torch.empty_like(found[..., part.tokens, :])
        run(selecting(here, caches, part.batch, selection, plan, scoring, into))
        if into is not found:
            found[..., part.tokens, :] = into
    return found


def selecting(
    index_q: Tensor,
    caches: LayerCaches,
    batch: Batch,
    selection: Selection,
    plan: Plan,
    scoring: score.Config | None,
    found: Tensor,
) -> list[Launch]:
    """The launches that fill ``found`` by a plan made for them.

    Args:
        found: ``[num_index_heads, num_tokens, topk]`` int32, block numbers; or ``[2, num_index_heads, num_tokens,
            topk]``, candidates of the plan's share.
    """
    if not found.numel():
        return []
    choose = select_topk if found.dim() == 3 else topk_of_share
    if scoring is None:
        return [choose(None, batch, selection, plan, found)]
    scores, score_launch = score.score_blocks(index_q, caches, batch, selection, plan, scoring)
    return [score_launch, choose(scores, batch, selection, plan, found)]


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


def selecting_shape(index_q: Tensor, selection: Selection, scoring: score.Config | None, share: Share = ALL) -> Shape:
    """A plan for selection alone."""
    num_tokens, num_heads, _ = index_q.shape
    return Shape(
        num_tokens=num_tokens,
        num_kv_heads=num_heads,
        topk=selection.topk,
        score_own=selection.local_blocks == 0,
        score_tile_tokens=0 if scoring is None else score.tile_tokens(scoring, num_heads),
        score_programs=0 if scoring is None else score.programs(scoring, index_q.device),
        share=share,
    )
