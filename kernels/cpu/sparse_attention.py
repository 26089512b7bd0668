"""Attend to the selected blocks, one cache block at a time for all the queries that chose it.

A *pair* is a query token, with the query heads of one KV head, and a block selected for them. Pairs of one block are
cut into *tiles*, so that the block is fetched once and met by one matmul; many small tiles, as in decoding, make one
batched matmul. Each pair leaves a partial softmax behind, and the partials of a token are combined at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..batch import BLOCK_SIZE, Batch
from ..caches import LayerCaches
from .paging import gather_blocks, locate_tokens

MAX_PARTIALS = 1 << 25
"""Elements of partial outputs held at a time: 128 MB of fp32."""
TILE_ROWS = 512
"""Query vectors in a full tile: enough that fetching its block costs little beside the matmul."""
MAX_LOGITS = 1 << 18
"""Elements of logits computed at a time: 1 MB, so that the softmax runs in cache."""
MAX_TILES = 32
"""Tiles computed at a time: 4 MB of fp32 keys and values."""


class Partials(NamedTuple):
    """The unnormalised softmax of every pair; the last entry is scratch, for the empty lanes of a tile."""

    out: Tensor
    """``[num_pairs + 1, group, head_dim]``"""
    max: Tensor
    """``[num_pairs + 1, group]`` the logit that ``out`` and ``sum`` are relative to."""
    sum: Tensor
    """``[num_pairs + 1, group]``"""


class Pairs(NamedTuple):
    """Pairs whose blocks are seen either all in whole or all in part."""

    index: Tensor
    """``[n]`` place in the partials: ``(token * num_kv_heads + kv_head) * topk + slot``."""
    page: Tensor
    """``[n]`` page of the block."""
    head: Tensor
    """``[n]`` KV head."""
    tile_key: Tensor
    """``[n]`` equal for pairs that may share a tile."""
    seen: Tensor | None
    """``[n]`` how many of the block's tokens the query sees, None for all."""


def sparse_attention(
    q: Tensor, caches: LayerCaches, block_ids: Tensor, batch: Batch, scale: float, out: Tensor | None = None
) -> Tensor:
    """See :func:`msa_backend.kernels.api.sparse_attention`."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, _, topk = block_ids.shape
    group = num_heads // num_kv_heads
    out = torch.empty_like(q) if out is None else out
    sequence, position = locate_tokens(batch, num_tokens)
    block_ids = block_ids.transpose(0, 1).long()

    tokens_at_a_time = min(num_tokens, max(1, MAX_PARTIALS // (topk * num_heads * head_dim)))
    # Allocated once: fresh memory for every few tokens costs more in page faults than the copies into it.
    partial_out = q.new_empty(tokens_at_a_time * num_kv_heads * topk + 1, group, head_dim, dtype=torch.float32)
    for start in range(0, num_tokens, tokens_at_a_time or 1):
        here = slice(start, start + tokens_at_a_time)
        slots = min(topk, int(position[here].max()) // BLOCK_SIZE + 1)  # no token here sees more blocks
        if slots == 0:
            out[here] = 0
            continue
        grouped_q = (q[here].float() * (scale * caches.k_scale)).reshape(-1, group, head_dim)
        ids = block_ids[here, :, :slots]
        partials = attend_pairs(grouped_q, caches, ids, sequence[here], position[here], batch.block_table, partial_out)
        out[here] = combine(partials, slots).view(-1, num_heads, head_dim) * caches.v_scale
    return out


def attend_pairs(
    q: Tensor,
    caches: LayerCaches,
    block_ids: Tensor,
    sequence: Tensor,
    position: Tensor,
    block_table: Tensor,
    partial_out: Tensor,
) -> Partials:
    """The partial softmax of every pair of a few tokens.

    Args:
        q: ``[num_tokens * num_kv_heads, group, head_dim]`` fp32, scaled.
        block_ids: ``[num_tokens, num_kv_heads, topk]`` int64.
        sequence, position: ``[num_tokens]``.
        block_table: ``[num_seqs, max_pages]``.
        partial_out: ``[at least num_pairs + 1, group, head_dim]`` fp32, the memory of the result.
    """
    _, num_kv_heads, topk = block_ids.shape
    _, group, head_dim = q.shape
    num_pairs = block_ids.numel()
    q = torch.cat([q, q.new_zeros(1, group, head_dim)])  # the query of empty lanes
    partials = Partials(
        out=partial_out[: num_pairs + 1],
        max=q.new_full((num_pairs + 1, group), -torch.inf),
        sum=q.new_zeros(num_pairs + 1, group),
    )
    seen = position[:, None, None] + 1 - block_ids * BLOCK_SIZE
    selected = (block_ids >= 0) & (seen > 0)
    # What is not selected weighs 0, but 0 x NaN is NaN: the memory may hold anything.
    partials.out[:-1][~selected.flatten()] = 0

    for in_whole in (True, False):
        token, head, slot = (selected & ((seen >= BLOCK_SIZE) == in_whole)).nonzero(as_tuple=True)
        block = block_ids[token, head, slot]
        page = block_table[sequence[token], block].long()
        # Sequences share a tile only where each sees the whole page: one's unseen tokens may be another's NaN.
        shared = page if in_whole else sequence[token] * block_table.shape[1] + block
        pairs = Pairs(
            index=(token * num_kv_heads + head) * topk + slot,
            page=page,
            head=head,
            tile_key=shared * num_kv_heads + head,
            seen=None if in_whole else seen[token, head, slot],
        )
        for lanes in tiles(pairs.tile_key, group):
            attend_tiles(q, caches, pairs, lanes, topk, partials)
    return partials


def tiles(tile_key: Tensor, group: int) -> Iterator[Tensor]:
    """Cut pairs into tiles by key, and hand out a few tiles of about one size at a time.

    Yields:
        ``[num_tiles, tile_size]`` places in ``tile_key``; those of a tile have one key. -1 is an empty lane, and
        never the first of a tile.
    """
    max_size = max(1, TILE_ROWS // group)
    key, order = tile_key.sort(stable=True)
    _, count = key.unique_consecutive(return_counts=True)
    num_tiles = (count + max_size - 1) // max_size
    of_key = torch.arange(len(count), device=key.device).repeat_interleave(num_tiles)
    offset = (torch.arange(len(of_key), device=key.device) - (num_tiles.cumsum(0) - num_tiles)[of_key]) * max_size
    size, by_size = (count[of_key] - offset).clamp(max=max_size).sort(descending=True)
    start = ((count.cumsum(0) - count)[of_key] + offset)[by_size]

    sizes = size.tolist()
    i = 0
    while i < len(sizes):
        here = slice(i, i + min(MAX_TILES, max(1, MAX_LOGITS // (sizes[i] * group * BLOCK_SIZE))))
        lane = torch.arange(sizes[i], device=key.device)
        empty = lane >= size[here, None]
        yield order[(start[here, None] + lane).masked_fill(empty, 0)].masked_fill(empty, -1)
        i = here.stop


def attend_tiles(q: Tensor, caches: LayerCaches, pairs: Pairs, lanes: Tensor, topk: int, partials: Partials) -> None:
    """Fetch one block for each of some tiles and attend to it with all the tile's pairs."""
    _, group, head_dim = q.shape
    scratch = len(partials.out) - 1
    index = torch.where(lanes >= 0, pairs.index[lanes], scratch).flatten()
    page, head = pairs.page[lanes[:, 0]], pairs.head[lanes[:, 0]]
    k, v = gather_blocks(caches.k_pages, page, head), gather_blocks(caches.v_pages, page, head)

    logits = torch.bmm(q.index_select(0, index // topk).view(len(lanes), -1, head_dim), k.mT)
    if pairs.seen is not None:
        seen = pairs.seen[lanes].masked_fill(lanes < 0, 0)
        within = torch.arange(BLOCK_SIZE, device=q.device)
        unseen = (within >= seen[..., None]).repeat_interleave(group, dim=1)
        logits.masked_fill_(unseen, torch.finfo(logits.dtype).min)
        # Tokens that no query of the tile sees weigh 0, but what lies there may be NaN, and 0 x NaN is NaN.
        v.masked_fill_((within >= seen.amax(1, keepdim=True))[..., None], 0)
    largest = logits.amax(-1, keepdim=True)
    weights = logits.sub_(largest).exp_()
    partials.out.index_copy_(0, index, torch.bmm(weights, v).view(-1, group, head_dim))
    partials.max.index_copy_(0, index, largest.view(-1, group))
    partials.sum.index_copy_(0, index, weights.sum(-1).view(-1, group))


def combine(partials: Partials, topk: int) -> Tensor:
    """Merge the partial softmaxes of each token's slots.

    Returns:
        ``[num_tokens * num_kv_heads, group, head_dim]`` fp32, 0 where nothing was selected.
    """
    out, largest, total = (x[:-1].unflatten(0, (-1, topk)) for x in partials)
    # Where nothing was selected the largest logit is -inf, and -inf - -inf is NaN.
    overall = largest.amax(1, keepdim=True).clamp(min=torch.finfo(largest.dtype).min)
    weight = (largest - overall).exp_()
    # The sum is at least 1, the weight of the largest logit itself, unless nothing was selected.
    weight /= (weight * total).sum(1, keepdim=True).clamp(min=1)
    weight = weight[..., None]
    merged = out[:, 0] * weight[:, 0]
    for slot in range(1, topk):  # slot by slot reads the partials once, four times as fast as sum(out * weight)
        merged.addcmul_(out[:, slot], weight[:, slot])
    return merged
