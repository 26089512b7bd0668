"""What MSA computes, written to be read: the definition every other implementation is tested against.

Slow on purpose: one row and one head at a time, whole score matrices, fp64 by default. The method is that of the
MSA report, arXiv:2606.13392. Shapes are those of :mod:`msa_backend.kernels.api`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .batch import BLOCK_SIZE, Batch
from .caches import LayerCaches
from .selection import Selection


class Sequence(NamedTuple):
    """One sequence of a batch: its query tokens, and where each of its cached tokens lies."""

    tokens: slice
    positions: Tensor
    """``[query_len]`` position in the sequence of each query token."""
    key_positions: Tensor
    """``[seq_len]``: 0, 1, 2, ..."""
    pages: Tensor
    """``[seq_len]`` page of each cached token."""
    offsets: Tensor
    """``[seq_len]`` place of each cached token within its page."""

    @property
    def visible(self) -> Tensor:
        """``[query_len, seq_len]`` bool: a query sees the tokens up to its own."""
        return self.key_positions <= self.positions[:, None]


def sequences(batch: Batch) -> Iterator[Sequence]:
    bounds = batch.cu_seqlens_q.tolist()
    for i, (seq_len, context_len) in enumerate(zip(batch.seq_lens.tolist(), batch.context_lens.tolist(), strict=True)):
        if seq_len <= 0:  # padding
            continue
        key_positions = torch.arange(seq_len)
        yield Sequence(
            tokens=slice(bounds[i], bounds[i + 1]),
            positions=context_len + torch.arange(bounds[i + 1] - bounds[i]),
            key_positions=key_positions,
            pages=batch.block_table[i].cpu()[key_positions // BLOCK_SIZE].long(),
            offsets=key_positions % BLOCK_SIZE,
        )


def norm_rope(
    x: Tensor,
    weight: Tensor,
    positions: Tensor,
    cos_sin_cache: Tensor,
    *,
    eps: float,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """RMS-norm each head, Gemma style, then rotate its first channels, half-split (NeoX).

    Args:
        x: ``[num_tokens, num_heads, dim]``.
        weight: ``[dim]``, what the norm multiplies by less 1.
        positions: ``[num_tokens]``; those outside of the cache are taken for the nearest inside.
        cos_sin_cache: ``[max_positions, rotary_dim]``, the cosines of ``rotary_dim / 2`` angles, then their sines.

    Returns:
        ``[num_tokens, num_heads, dim]`` in ``dtype``.
    """
    x = x.to(dtype)
    x = x * (x.square().mean(dim=-1, keepdim=True) + eps).rsqrt() * (weight.to(dtype) + 1)
    max_positions, rotary_dim = cos_sin_cache.shape
    angles = cos_sin_cache[positions.clamp(0, max_positions - 1)].to(dtype)[:, None]
    cos, sin = angles.chunk(2, dim=-1)
    first, second = x[..., :rotary_dim].chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, x[..., rotary_dim:]), dim=-1)


def block_scores(index_q: Tensor, caches: LayerCaches, batch: Batch, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """The score of a block: the largest ``index_q . index_k`` over the tokens of it that the query sees.

    Returns:
        ``[num_index_heads, num_tokens, max_blocks]`` in ``dtype``; -inf where the query sees nothing of the block.
    """
    num_tokens, num_heads, _ = index_q.shape
    max_blocks = -(-batch.max_seq_len // BLOCK_SIZE)
    index_k_pages = caches.index_k_pages
    assert index_k_pages is not None, "a dense layer selects nothing"
    scores = torch.full((num_heads, num_tokens, max_blocks), -torch.inf, dtype=dtype)
    for sequence in sequences(batch):
        index_k = index_k_pages[sequence.pages, sequence.offsets].to(dtype)
        for head in range(num_heads):
            dots = index_q[sequence.tokens, head].to(dtype) @ index_k.T
            dots = dots.masked_fill(~sequence.visible, -torch.inf)
            for block, of_block in enumerate(dots.split(BLOCK_SIZE, dim=1)):
                scores[head, sequence.tokens, block] = of_block.amax(dim=1)
    return scores


def select_blocks(
    index_q: Tensor, caches: LayerCaches, batch: Batch, selection: Selection, *, dtype: torch.dtype = torch.float64
) -> Tensor:
    """The blocks each (index head, query token) attends to.

    The first ``init_blocks`` and the newest ``local_blocks`` of the blocks a query sees, its own counted, are taken
    whatever they score; the best-scoring others fill up to ``topk``. All are taken if there are no more than that.

    Returns:
        ``[num_index_heads, num_tokens, topk]`` int32 logical block numbers, ascending, -1 after the last.
    """
    num_tokens, num_heads, _ = index_q.shape
    scores = block_scores(index_q, caches, batch, dtype=dtype)
    topk, init_blocks, local_blocks = selection.topk, selection.init_blocks, selection.local_blocks
    block_ids = torch.full((num_heads, num_tokens, topk), -1, dtype=torch.int32)
    for sequence in sequences(batch):
        for token, sees in zip(
            range(sequence.tokens.start, sequence.tokens.stop), sequence.visible.sum(dim=1).tolist(), strict=True
        ):
            num_blocks = -(-sees // BLOCK_SIZE)
            forced = {block for block in range(num_blocks) if block < init_blocks or block >= num_blocks - local_blocks}
            for head in range(num_heads):
                by_score = scores[head, token, :num_blocks].argsort(descending=True, stable=True).tolist()
                ranking = sorted(forced) + [block for block in by_score if block not in forced]
                chosen = sorted(ranking[:topk])
                block_ids[head, token, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
    return block_ids


def sparse_attention(
    q: Tensor,
    caches: LayerCaches,
    block_ids: Tensor,
    batch: Batch,
    scale: float,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Causal softmax attention over the tokens of the selected blocks, and nothing else.

    Returns:
        ``[num_tokens, num_heads, head_dim]`` in ``dtype``; 0 for a token that sees none of its blocks.
    """
    num_heads = q.shape[1]
    group = num_heads // caches.num_kv_heads
    out = torch.zeros(q.shape, dtype=dtype)
    for sequence in sequences(batch):
        key_blocks = sequence.key_positions // BLOCK_SIZE
        for head in range(num_heads):
            kv_head = head // group
            selected = (key_blocks[:, None] == block_ids[kv_head, sequence.tokens, None, :]).any(dim=-1)
            k = caches.k_pages[sequence.pages, kv_head, sequence.offsets].to(dtype) * caches.k_scale
            v = caches.v_pages[sequence.pages, kv_head, sequence.offsets].to(dtype) * caches.v_scale
            logits = q[sequence.tokens, head].to(dtype) @ k.T * scale
            weights = logits.masked_fill(~(sequence.visible & selected), -torch.inf).softmax(dim=1)
            # A row of -inf alone has no softmax: nothing was selected, and the output is 0.
            out[sequence.tokens, head] = weights.nan_to_num(nan=0.0) @ v
    return out


def dense_attention(
    q: Tensor, caches: LayerCaches, batch: Batch, scale: float, *, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Ordinary causal attention over the whole sequence: what MSA equals while all visible blocks fit in top-k."""
    max_blocks = -(-batch.max_seq_len // BLOCK_SIZE)
    every_block = torch.arange(max_blocks).expand(caches.num_kv_heads, q.shape[0], max_blocks)
    return sparse_attention(q, caches, every_block, batch, scale, dtype=dtype)
