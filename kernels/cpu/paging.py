"""Where a query token stands in its sequence, and how a block leaves the cache."""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from ..batch import BLOCK_SIZE, Batch


def locate_tokens(batch: Batch, num_tokens: int) -> tuple[Tensor, Tensor]:
    """The sequence of each query token and its position there.

    Returns:
        Two ``[num_tokens]`` int64 tensors. The position is -1 for padding, the tokens past ``cu_seqlens_q[-1]`` and
        those of sequences without a length; their sequence is any valid one.
    """
    bounds = batch.cu_seqlens_q
    token = torch.arange(num_tokens, device=bounds.device)
    if batch.num_seqs == 0:
        return token, torch.full_like(token, -1)
    sequence = torch.searchsorted(bounds[1:].contiguous(), token, right=True)
    in_a_sequence = sequence < batch.num_seqs
    sequence = sequence.clamp(max=batch.num_seqs - 1)
    live = in_a_sequence & (batch.seq_lens[sequence] > 0)
    return sequence, torch.where(live, batch.context_lens[sequence] + token - bounds[sequence], -1)


def gather_blocks(pages: Tensor, page: Tensor, head: Tensor | int = 0) -> Tensor:
    """Copy whole blocks out of the cache, in fp32.

    Args:
        pages: ``[num_pages, num_heads, 128, dim]``, any strides but 1 on the last axis.
        page: ``[n]`` int64.
        head: ``[n]`` int64, or one head for all.

    Returns:
        ``[n, 128, dim]`` fp32, contiguous.
    """
    # Indexing a strided tensor by (page, head) walks it element by element. Seen as a flat list of vectors, every
    # layout (page-major, token-major, K and V interleaved) becomes one index_select, three to five times as fast.
    dim = pages.shape[-1]
    page_stride, head_stride, token_stride, _ = pages.stride()
    unit = gcd(page_stride, head_stride, token_stride)
    last = sum((size - 1) * stride for size, stride in zip(pages.shape[:3], pages.stride()[:3], strict=True)) // unit
    vectors = pages.as_strided((last + 1, dim), (unit, 1))

    first = page * (page_stride // unit) + head * (head_stride // unit)
    within = torch.arange(BLOCK_SIZE, device=pages.device) * (token_stride // unit)
    index = (first[:, None] + within).flatten()
    if pages.element_size() == 1:  # fp8 has no index_select: move its bytes
        return vectors.view(torch.uint8).index_select(0, index).view(pages.dtype).float().view(-1, BLOCK_SIZE, dim)
    return vectors.index_select(0, index).float().view(-1, BLOCK_SIZE, dim)
