"""Which kernel attends to which tokens, and how much is held at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..batch import BLOCK_SIZE, Batch
from ..caches import LayerCaches
from . import query_outer
from .launch import Launch, run
from .pages import check_dim
from .plan import Plan, Shape, plan_of
from .prefill.kv_outer import attend_kv_outer
from .prefill.slices import slices
from .sizes import next_power_of_2
from .workspace import workspace_of

SHORT_QUERY_LEN = 16
SHORT_STEP = 512
"""Queries outer for steps of sequences with no more query tokens, or of no more in all. In longer ones, tokens whose
neighbours select other blocks are left to KV outer: there are enough for some to select the same block."""
MAX_PARTIAL_BYTES = 9 << 28
"""Partial outputs held at a time: those of 8,192 tokens and 64 heads."""


class Road(NamedTuple):
    """How a step is attended to.

    Attributes:
        kv_outer: whether tokens whose neighbours select other blocks are taken KV outer.
        splits: whether programs share out the blocks of a tile where tiles are few.
    """

    kv_outer: bool
    splits: bool


def road_of(q: Tensor, caches: LayerCaches, batch: Batch, topk: int) -> Road:
    """The one for this step, from shapes alone."""
    num_tokens, num_heads, _ = q.shape
    if batch.max_query_len <= SHORT_QUERY_LEN or num_tokens <= SHORT_STEP:
        return Road(kv_outer=False, splits=True)
    # A tile of one token selects no more than top-k blocks, and none more than there are.
    may_disagree = query_outer.tile_tokens(num_heads // caches.num_kv_heads) > 1
    kv_outer = may_disagree and batch.max_seq_len > query_outer.most_blocks(topk) * BLOCK_SIZE
    return Road(kv_outer, splits=False)


def sparse_attention(
    q: Tensor, caches: LayerCaches, block_ids: Tensor, batch: Batch, scale: float, out: Tensor | None = None
) -> Tensor:
    """See :func:`msa_backend.kernels.api.sparse_attention`; ``head_dim`` a power of two from 16 to 128."""
    check_dim("head_dim", caches.head_dim)
    out = torch.empty_like(q) if out is None else out
    if not q.numel():
        return out
    num_tokens, num_heads, _ = q.shape
    topk = block_ids.shape[2]
    road = road_of(q, caches, batch, topk)
    at_a_time = together(q, caches, road, topk)
    if at_a_time == (num_tokens, caches.num_kv_heads):
        plan = plan_of(batch, attending_shape(q, caches, batch, road, topk))
        run(attending(q, caches, block_ids, batch, plan, road, scale, out, follows_topk=False))
        return out
    group = num_heads // caches.num_kv_heads
    for part in slices(batch, num_tokens, at_a_time[0]):
        for first in range(0, caches.num_kv_heads, at_a_time[1]):
            of_part = _heads_of(caches, slice(first, first + at_a_time[1]))
            heads = slice(first * group, (first + at_a_time[1]) * group)
            q_part, ids_part = q[part.tokens, heads], block_ids[first : first + at_a_time[1], part.tokens]
            plan = plan_of(part.batch, attending_shape(q_part, of_part, part.batch, road, topk))
            launches = attending(
                q_part, of_part, ids_part, part.batch, plan, road, scale, out[part.tokens, heads], follows_topk=False
            )
            run(launches)
    return out


def attending(
    q: Tensor,
    caches: LayerCaches,
    block_ids: Tensor,
    batch: Batch,
    plan: Plan,
    road: Road,
    scale: float,
    out: Tensor,
    follows_topk: bool,
) -> list[Launch]:
    """The launches that write ``out``, of a step that need not be cut, by a plan that was made for it.

    Args:
        follows_topk: as :func:`.query_outer.attend_query_outer` says.
    """
    if not road.kv_outer:
        return [query_outer.attend_query_outer(q, caches, block_ids, batch, plan, scale, out, None, follows_topk)]
    most_blocks = query_outer.most_blocks(block_ids.shape[2])
    taken = workspace_of(batch).hold("taken", plan.max_programs, torch.int32)
    return [
        *attend_kv_outer(q, caches, block_ids, batch, plan, scale, out, most_blocks, taken),
        query_outer.attend_query_outer(q, caches, block_ids, batch, plan, scale, out, taken, follows_topk=False),
    ]


def together(q: Tensor, caches: LayerCaches, road: Road, topk: int) -> tuple[int, int]:
    """Tokens and KV heads whose partial outputs fit in memory.

    KV heads are cut first: that costs nothing, while fewer tokens at a time share fewer loads of a block.
    """
    num_tokens, num_heads, dim = q.shape
    if not road.kv_outer:
        return num_tokens, caches.num_kv_heads
    head_bytes = topk * next_power_of_2(num_heads // caches.num_kv_heads) * dim * q.element_size()
    tokens = min(num_tokens, max(1, MAX_PARTIAL_BYTES // head_bytes))
    return tokens, min(caches.num_kv_heads, max(1, MAX_PARTIAL_BYTES // (head_bytes * tokens)))


def _heads_of(caches: LayerCaches, kv_heads: slice) -> LayerCaches:
    key = "heads", kv_heads.start, kv_heads.stop
    if key not in caches.kept:
        k_pages, v_pages = caches.k_pages[:, kv_heads], caches.v_pages[:, kv_heads]
        caches.kept[key] = LayerCaches(k_pages, v_pages, None, caches.k_scale, caches.v_scale)
    return caches.kept[key]


def attending_shape(q: Tensor, caches: LayerCaches, batch: Batch, road: Road, topk: int) -> Shape:
    """A plan for attention alone."""
    num_tokens, num_heads, _ = q.shape
    tiling = query_outer.tiling(num_heads // caches.num_kv_heads, topk, batch)
    return Shape(
        num_tokens=num_tokens,
        num_kv_heads=caches.num_kv_heads,
        topk=topk,
        tile_tokens=tiling.tokens,
        programs=tiling.programs if road.splits else 0,
        tile_blocks=tiling.blocks,
    )
