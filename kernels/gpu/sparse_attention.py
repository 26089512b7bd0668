"""Which kernel attends to which tokens, and how much is held at a time."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..batch import BLOCK_SIZE, Batch, Part
from ..caches import LayerCaches
from . import query_outer
from .pages import check_dim
from .plan import UNLIMITED, Plan, Shape, plan_of
from .prefill.kv_outer import attend_kv_outer
from .prefill.slices import slices
from .sizes import next_power_of_2

SHORT_QUERY_LEN = 16
SHORT_STEP = 512
"""Queries outer for steps of sequences with no more query tokens, or of no more in all. In longer ones enough tokens
select the same block for it to pay to bring them together."""
NEAR_BLOCKS = 24
"""Queries outer, too, for tokens that see no more blocks: they select most of them. Measured per visible block it takes
10.9 ns, keys outer 15.4 per selected block."""
MAX_PARTIAL_BYTES = 9 << 28
"""Partial outputs held at a time: those of 8,192 tokens and 64 heads."""


class Road(NamedTuple):
    """How a step is attended to.

    Attributes:
        near: tokens that see no more blocks than this are taken queries outer; None for all.
        splits: whether programs share out the blocks of a tile where tiles are few.
    """

    near: int | None
    splits: bool


def road_of(batch: Batch, num_tokens: int, topk: int) -> Road:
    """The one for this step, from shapes alone."""
    if batch.max_query_len <= SHORT_QUERY_LEN or num_tokens <= SHORT_STEP:
        return Road(None, True)
    # With a small top-k most of a walk over all blocks is in vain.
    near = min(NEAR_BLOCKS, topk * 3 // 2)
    return Road(near if batch.max_seq_len > near * BLOCK_SIZE else None, False)


def sparse_attention(
    q: Tensor, caches: LayerCaches, block_ids: Tensor, batch: Batch, scale: float, out: Tensor | None = None
) -> Tensor:
    """See :func:`msa_backend.kernels.api.sparse_attention`; ``head_dim`` a power of two from 16 to 128."""
    check_dim("head_dim", caches.head_dim)
    out = torch.empty_like(q) if out is None else out
    road = road_of(batch, q.shape[0], block_ids.shape[2])
    plan = plan_of(batch, attending_shape(q, caches, batch, road, block_ids.shape[2]))
    attend_selected(q, caches, block_ids, batch, plan, road, scale, out)
    return out


def attend_selected(
    q: Tensor, caches: LayerCaches, block_ids: Tensor, batch: Batch, plan: Plan, road: Road, scale: float, out: Tensor
) -> None:
    """Write ``out`` by a plan that was made for it."""
    if q.numel() == 0:
        return
    near = road.near
    if near is None or batch.min_context_len < near * BLOCK_SIZE:
        query_outer.attend_query_outer(q, caches, block_ids, batch, plan, scale, out)
    if near is None:
        return
    # KV heads first: cutting there costs nothing, while fewer tokens at a time share fewer loads of a block.
    num_tokens, num_heads, dim = q.shape
    num_kv_heads = caches.num_kv_heads
    group = num_heads // num_kv_heads
    head_bytes = block_ids.shape[2] * next_power_of_2(group) * dim * q.element_size()
    tokens_at_a_time = min(num_tokens, max(1, MAX_PARTIAL_BYTES // head_bytes))
    heads_at_a_time = min(num_kv_heads, max(1, MAX_PARTIAL_BYTES // (head_bytes * tokens_at_a_time)))
    if (tokens_at_a_time, heads_at_a_time) == (num_tokens, num_kv_heads):
        attend_kv_outer(q, caches, block_ids, batch, plan, scale, out, near)
        return
    for part in slices(batch, num_tokens, tokens_at_a_time):
        for first in range(0, num_kv_heads, heads_at_a_time):
            kv_heads = slice(first, first + heads_at_a_time)
            heads = slice(first * group, (first + heads_at_a_time) * group)
            _attend_piece(
                q[:, heads], _heads_of(caches, kv_heads), block_ids[kv_heads], part, scale, out[:, heads], near
            )


def _attend_piece(
    q: Tensor, caches: LayerCaches, block_ids: Tensor, part: Part, scale: float, out: Tensor, near: int
) -> None:
    q, out = q[part.tokens], out[part.tokens]
    plan = plan_of(part.batch, Shape(num_tokens=q.shape[0], num_kv_heads=caches.num_kv_heads))
    attend_kv_outer(q, caches, block_ids[:, part.tokens], part.batch, plan, scale, out, near)


def _heads_of(caches: LayerCaches, kv_heads: slice) -> LayerCaches:
    key = "heads", kv_heads.start, kv_heads.stop
    if key not in caches.kept:
        k_pages, v_pages = caches.k_pages[:, kv_heads], caches.v_pages[:, kv_heads]
        caches.kept[key] = LayerCaches(k_pages, v_pages, None, caches.k_scale, caches.v_scale)
    return caches.kept[key]


def attending_shape(q: Tensor, caches: LayerCaches, batch: Batch, road: Road, topk: int) -> Shape:
    """A plan for attention alone."""
    num_tokens, num_heads, _ = q.shape
    group = num_heads // caches.num_kv_heads
    return Shape(
        num_tokens=num_tokens,
        num_kv_heads=caches.num_kv_heads,
        topk=topk,
        tile_tokens=query_outer.tokens_of_a_tile(group, batch),
        tile_limit=UNLIMITED if road.near is None else road.near * BLOCK_SIZE,
        programs=query_outer.programs(q.device) if road.splits else 0,
    )
