"""Select and attend by one plan of the step, over memory that all its layers share."""

from __future__ import annotations

import torch
from torch import Tensor

from ..batch import Batch
from ..caches import LayerCaches
from ..selection import Selection
from . import score
from .pages import check_dim
from .plan import plan_of
from .select_blocks import needs_scores, select, select_blocks, selecting_shape, tokens_at_a_time
from .sparse_attention import attend_selected, attending_shape, road_of, sparse_attention


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
    num_tokens, num_heads = q.shape[0], caches.num_kv_heads
    if num_tokens > tokens_at_a_time(batch, num_tokens, num_heads, selection):
        block_ids = select_blocks(index_q, caches, batch, selection)
        return sparse_attention(q, caches, block_ids, batch, scale, out)
    check_dim("head_dim", caches.head_dim)
    check_dim("index_dim", caches.index_dim)
    out = torch.empty_like(q) if out is None else out
    scoring = score.config_of(index_q, caches, batch) if needs_scores(batch, selection) else None
    road = road_of(batch, num_tokens, selection.topk)
    selecting = selecting_shape(index_q, selection, scoring)
    attending = attending_shape(q, caches, batch, road, selection.topk)
    plan = plan_of(
        batch,
        selecting._replace(
            tile_tokens=attending.tile_tokens, tile_limit=attending.tile_limit, programs=attending.programs
        ),
    )
    block_ids = plan.hold("block_ids", num_heads * num_tokens * selection.topk, torch.int32)
    block_ids = block_ids.view(num_heads, num_tokens, selection.topk)
    select(index_q, caches, batch, selection, plan, scoring, block_ids)
    attend_selected(q, caches, block_ids, batch, plan, road, scale, out)
    return out
