"""Select and attend by one plan of the step, over memory that all its layers share."""

from __future__ import annotations

import torch
from torch import Tensor

from ..batch import Batch
from ..caches import LayerCaches
from ..selection import Selection
from .launch import Launch, Repeated, run
from .pages import Pages, check_dim
from .plan import plan_of
from .score import multiplicable
from .select_blocks import scoring_of, select_blocks, selecting, selecting_shape, tokens_at_a_time
from .sparse_attention import attending, attending_shape, road_of, sparse_attention, together
from .workspace import kept_of, workspace_of


def attend(
    q: Tensor,
    index_q: Tensor,
    caches: LayerCaches,
    batch: Batch,
    selection: Selection,
    scale: float,
    out: Tensor | None = None,
) -> Tensor:
    """See :func:`msa_backend.kernels.api.attend`; ``head_dim`` and ``index_dim`` powers of two from 16 to 128."""
    out = torch.empty_like(q) if out is None else out
    if not q.numel():
        return out
    index_q = multiplicable(index_q)
    pages = caches.keep(Pages)
    layer = [q, index_q, out, *pages.exchanged, pages.logit_scale(scale), pages.v_scale]
    alike = (
        q.shape, q.stride(), q.dtype, index_q.stride(), index_q.dtype, out.stride(), out.dtype, pages.layout, selection,
        scale,
    )  # fmt: skip
    kept = kept_of(batch)
    repeated = kept.get(alike)
    if repeated is not None:
        repeated(layer)
    elif _must_be_cut(q, caches, batch, selection):
        block_ids = select_blocks(index_q, caches, batch, selection)
        sparse_attention(q, caches, block_ids, batch, scale, out)
    else:
        launches = _launches(q, index_q, caches, batch, selection, scale, out)
        run(launches)
        kept[alike] = Repeated(launches, layer)
    return out


def _must_be_cut(q: Tensor, caches: LayerCaches, batch: Batch, selection: Selection) -> bool:
    num_tokens, num_kv_heads = q.shape[0], caches.num_kv_heads
    road = road_of(q, caches, batch, selection.topk)
    return (
        num_tokens > tokens_at_a_time(batch, num_tokens, num_kv_heads, selection)
        or together(q, caches, road, selection.topk) != (num_tokens, num_kv_heads)
    )  # fmt: skip


def _launches(
    q: Tensor, index_q: Tensor, caches: LayerCaches, batch: Batch, selection: Selection, scale: float, out: Tensor
) -> list[Launch]:
    check_dim("head_dim", caches.head_dim)
    check_dim("index_dim", caches.index_dim)
    num_tokens, num_kv_heads, topk = q.shape[0], caches.num_kv_heads, selection.topk
    scoring = scoring_of(index_q, caches, batch, selection)
    road = road_of(q, caches, batch, topk)
    shape = attending_shape(q, caches, batch, road, topk)
    of_scoring = selecting_shape(index_q, selection, scoring)
    plan = plan_of(
        batch,
        shape._replace(
            score_own=of_scoring.score_own,
            score_tile_tokens=of_scoring.score_tile_tokens,
            score_programs=of_scoring.score_programs,
        ),
    )
    block_ids = workspace_of(batch).hold("block_ids", num_kv_heads * num_tokens * topk, torch.int32)
    block_ids = block_ids.view(num_kv_heads, num_tokens, topk)
    return [
        *selecting(index_q, caches, batch, selection, plan, scoring, block_ids),
        *attending(q, caches, block_ids, batch, plan, road, scale, out, follows_topk=True),
    ]
