"""Choose each query token's blocks: score what does not fit in top-k anyway, keep the best."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from ..batch import BLOCK_SIZE, Batch
from ..caches import LayerCaches
from ..selection import Selection
from ..share import ALL, Share
from .paging import gather_blocks, locate_tokens

SHORT_SEQUENCE = 16
"""Rows with up to this many tokens to score go together, one matmul for many sequences; longer ones each alone."""
TILE_TOKENS = 256
"""Tokens of a long sequence scored at a time. With 4 heads and 8 blocks the dot products are 4 MB and stay in cache."""
TILE_BLOCKS = 8
"""Blocks of a long sequence scored at a time."""
BATCH_BLOCKS = 64
"""Blocks of short sequences scored at a time: 4 MB of fp32 keys."""
MAX_SCORES = 1 << 24
"""Scores of short sequences held at a time: 64 MB."""


def select_blocks(index_q: Tensor, caches: LayerCaches, batch: Batch, selection: Selection) -> Tensor:
    """See :func:`msa_backend.kernels.api.select_blocks`."""
    position, own_block = places(batch, index_q.shape[0])
    block_ids = all_visible(own_block, selection.topk, index_q.shape[1])
    for tokens, scores in scored(index_q, position, caches, batch, selection, ALL):
        block_ids[:, tokens] = best_blocks(scores, own_block[tokens], selection)
    return block_ids


def select_candidates(index_q: Tensor, caches: LayerCaches, batch: Batch, selection: Selection, share: Share) -> Tensor:
    """See :func:`msa_backend.kernels.api.select_candidates`."""
    num_tokens, num_heads, _ = index_q.shape
    position, own_block = places(batch, num_tokens)
    candidates = index_q.new_full((2, num_heads, num_tokens, selection.topk), -1, dtype=torch.int32)
    candidates[0] = NONE
    for tokens, scores in scored(index_q, position, caches, batch, selection, share):
        block = share.rank + share.ranks * torch.arange(scores.shape[-1], device=scores.device)
        last_free = own_block[tokens][:, None] - selection.local_blocks
        free = (block >= selection.init_blocks) & (block <= last_free)
        best = ranked(scores).masked_fill(~free, -torch.inf).topk(min(free_blocks(selection), len(block)))
        count = best.indices.shape[-1]
        found = best.values > -torch.inf
        candidates[0, :, tokens, :count] = torch.where(found, order_keys(best.values), NONE)
        candidates[1, :, tokens, :count] = torch.where(found, block[best.indices], -1).int()
    return candidates


def merge_candidates(candidates: Tensor, batch: Batch, selection: Selection) -> Tensor:
    """See :func:`msa_backend.kernels.api.merge_candidates`."""
    _, _, num_heads, num_tokens, topk = candidates.shape
    _, own_block = places(batch, num_tokens)
    block_ids = all_visible(own_block, topk, num_heads)
    (tokens,) = torch.where(own_block >= topk)
    keys, blocks = candidates[:, :, :, tokens].permute(1, 2, 3, 0, 4).flatten(3)
    best = keys.topk(free_blocks(selection)).indices
    first, last = torch.arange(selection.init_blocks), torch.arange(selection.local_blocks)
    newest = own_block[tokens][:, None] - last.to(own_block.device)
    forced = torch.cat((first.to(newest).expand(len(tokens), -1), newest), dim=1).int().expand(num_heads, -1, -1)
    block_ids[:, tokens] = torch.cat((blocks.gather(-1, best), forced), dim=-1).sort().values
    return block_ids


NONE = -(1 << 31)
"""The key of no candidate, below those of all scores."""


def order_keys(scores: Tensor) -> Tensor:
    """int32 in the order of fp32."""
    bits = scores.view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def free_blocks(selection: Selection) -> int:
    """How many blocks are chosen by their scores."""
    return selection.topk - selection.init_blocks - selection.local_blocks


def places(batch: Batch, num_tokens: int) -> tuple[Tensor, Tensor]:
    """``[num_tokens]`` the position of each query token, and the block that it stands in; -1 for padding."""
    _, position = locate_tokens(batch, num_tokens)
    return position, position.div(BLOCK_SIZE, rounding_mode="floor")


def all_visible(own_block: Tensor, topk: int, num_heads: int) -> Tensor:
    """``[num_heads, num_tokens, topk]`` int32: the blocks that a token sees, as far as they fit; -1 after them."""
    block = torch.arange(topk, dtype=torch.int32, device=own_block.device)
    return torch.where(block <= own_block[:, None], block, -1).expand(num_heads, -1, -1).contiguous()


def scored(
    index_q: Tensor, position: Tensor, caches: LayerCaches, batch: Batch, selection: Selection, share: Share
) -> Iterator[tuple[Tensor, Tensor]]:
    """Query tokens that see more than ``topk`` blocks, some at a time, with their scores of the blocks of ``share``.

    Args:
        position: ``[num_tokens]``, as of :func:`places`.

    Yields:
        ``[n]`` tokens and ``[num_heads, n, num_blocks]`` fp32.
    """
    index_k_pages = caches.index_k_pages
    assert index_k_pages is not None, "checked by the operation"
    num_heads = index_q.shape[1]
    short, long = sequences_to_score(batch, first_position=selection.topk * BLOCK_SIZE)
    for sequence, start, stop in long:
        for tile in range(start, stop, TILE_TOKENS):
            tokens = torch.arange(tile, min(tile + TILE_TOKENS, stop), device=index_q.device)
            pages = batch.block_table[sequence]
            yield tokens, score_long_sequence(index_q[tokens], position[tokens], index_k_pages, pages, share)
    max_blocks = -(-batch.max_seq_len // BLOCK_SIZE)
    for num_new, same_length in short.items():
        sequences, starts = torch.tensor(same_length, device=index_q.device).unbind(1)
        at_a_time = max(1, MAX_SCORES // (num_new * num_heads * max_blocks))
        for sequence, start in zip(sequences.split(at_a_time), starts.split(at_a_time), strict=True):
            tokens = start[:, None] + torch.arange(num_new, device=index_q.device)
            pages = batch.block_table[sequence]
            yield (
                tokens.flatten(),
                score_short_sequences(index_q[tokens], position[tokens], index_k_pages, pages, share),
            )


def sequences_to_score(
    batch: Batch, first_position: int
) -> tuple[dict[int, list[tuple[int, int]]], list[tuple[int, int, int]]]:
    """The query tokens at ``first_position`` or later: the others see no more blocks than fit in top-k.

    Returns:
        The short sequences by their number of such tokens, each as (sequence, first such token); the long ones, each
        as (sequence, first such token, end).
    """
    short, long = defaultdict(list), []
    bounds, context_lens, seq_lens = (x.tolist() for x in (batch.cu_seqlens_q, batch.context_lens, batch.seq_lens))
    for sequence, (context_len, seq_len) in enumerate(zip(context_lens, seq_lens, strict=True)):
        start = bounds[sequence] + max(0, first_position - context_len)
        stop = bounds[sequence + 1]
        if seq_len <= first_position or start >= stop:
            continue
        if stop - start <= SHORT_SEQUENCE:
            short[stop - start].append((sequence, start))
        else:
            long.append((sequence, start, stop))
    return short, long


def score_long_sequence(
    index_q: Tensor, position: Tensor, index_k_pages: Tensor, block_table: Tensor, share: Share
) -> Tensor:
    """Score the blocks of ``share`` up to the last token's own, for neighbouring tokens of one sequence.

    Args:
        index_q: ``[num_tokens, num_heads, dim]``.
        position: ``[num_tokens]``, ascending.
        block_table: ``[max_pages]`` of the sequence.

    Returns:
        ``[num_heads, num_tokens, num_blocks]`` fp32.
    """
    num_tokens, num_heads, dim = index_q.shape
    first, last = int(position[0]), int(position[-1])
    block = torch.arange(last // BLOCK_SIZE + 1, device=index_q.device)[share.blocks]
    num_blocks = len(block)
    pages = block_table[block].long()
    within = torch.arange(BLOCK_SIZE, device=index_q.device)
    q = index_q.transpose(0, 1).float().reshape(num_heads * num_tokens, dim)
    scores = q.new_empty(num_heads, num_tokens, num_blocks)
    for start in range(0, num_blocks, TILE_BLOCKS):
        stop = min(start + TILE_BLOCKS, num_blocks)
        k = gather_blocks(index_k_pages[:, None], pages[start:stop]).flatten(0, 1)
        dots = (q @ k.T).view(num_heads, num_tokens, -1)
        if (share.rank + stop * share.ranks) * BLOCK_SIZE > first + 1:
            key_position = (block[start:stop, None] * BLOCK_SIZE + within).flatten()
            dots.masked_fill_(key_position > position[:, None], -torch.inf)
        scores[..., start:stop] = dots.unflatten(-1, (-1, BLOCK_SIZE)).amax(-1)
    return scores


def score_short_sequences(
    index_q: Tensor, position: Tensor, index_k_pages: Tensor, block_table: Tensor, share: Share
) -> Tensor:
    """Score the blocks of ``share`` for sequences with the same few tokens each. Cut by block, so that contexts may
    differ freely.

    Args:
        index_q: ``[num_seqs, num_new, num_heads, dim]``.
        position: ``[num_seqs, num_new]``.
        block_table: ``[num_seqs, max_pages]``.

    Returns:
        ``[num_heads, num_seqs * num_new, num_blocks]`` fp32, -inf past a sequence's last block.
    """
    num_seqs, num_new, num_heads, dim = index_q.shape
    num_blocks = position[:, -1] // BLOCK_SIZE + 1
    of_share = torch.arange(int(num_blocks.max()), device=position.device)[share.blocks]
    sequence, place = torch.where(of_share < num_blocks[:, None])
    block = of_share[place]
    page = block_table[sequence, block].long()
    q = index_q.float().reshape(num_seqs, num_new * num_heads, dim)
    scores = q.new_full((num_seqs, len(of_share), num_new, num_heads), -torch.inf)
    within = torch.arange(BLOCK_SIZE, device=position.device)
    for i in range(0, len(sequence), BATCH_BLOCKS):
        here = slice(i, i + BATCH_BLOCKS)
        k = gather_blocks(index_k_pages[:, None], page[here])
        dots = torch.bmm(q[sequence[here]], k.mT).unflatten(1, (num_new, num_heads))
        key_position = block[here, None] * BLOCK_SIZE + within
        hidden = key_position[:, None] > position[sequence[here], :, None]
        scores[sequence[here], place[here]] = dots.masked_fill_(hidden[:, :, None], -torch.inf).amax(-1)
    return scores.permute(3, 0, 2, 1).flatten(1, 2)


def best_blocks(scores: Tensor, own_block: Tensor, selection: Selection) -> Tensor:
    """The forced blocks and the best-scoring others, for tokens that see more than ``topk`` blocks.

    Args:
        scores: ``[num_heads, num_tokens, num_blocks]`` fp32.
        own_block: ``[num_tokens]`` the block of the token itself, the last it sees.

    Returns:
        ``[num_heads, num_tokens, topk]`` int32, ascending.
    """
    block = torch.arange(scores.shape[-1], device=scores.device)
    own_block = own_block[:, None]
    scores = ranked(scores)
    scores.masked_fill_((block < selection.init_blocks) | (block > own_block - selection.local_blocks), torch.inf)
    scores.masked_fill_(block > own_block, -torch.inf)
    return scores.topk(selection.topk, sorted=False).indices.sort().values.int()


def ranked(scores: Tensor) -> Tensor:
    """Scores as they are compared: only forced blocks may rank at +inf and only invisible ones at -inf, whatever an
    index key holds."""
    limit = torch.finfo(scores.dtype).max
    return scores.nan_to_num(nan=-limit, posinf=limit, neginf=-limit)
