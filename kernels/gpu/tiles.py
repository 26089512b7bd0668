"""A tile of keys or values out of the paged cache, in the dtype of the products."""

from __future__ import annotations

import triton.language as tl
from triton import jit

from .fp8 import widen

UNIT = tl.constexpr(16)
"""Strides come in units of 16 elements; see :mod:`.pages`."""


@jit
def live_page(entry_ptr, num_pages):
    """The page in a block table's entry. A sequence longer than its table was filled for reads some page, no fault."""
    return tl.minimum(tl.maximum(tl.load(entry_ptr), 0), num_pages - 1)


@jit
def head_offsets(head, head_stride, token_stride, BLOCK_N: tl.constexpr, DIM: tl.constexpr):
    """Of the first ``BLOCK_N`` tokens of a head within a page: ``[BLOCK_N, DIM]``."""
    offs_n = tl.arange(0, BLOCK_N)[:, None] * (token_stride * UNIT)
    return head.to(tl.int64) * head_stride * UNIT + offs_n + tl.arange(0, DIM)[None, :]


@jit
def load_tile(pages_ptr, page, page_stride, first, token_stride, offsets, dtype: tl.constexpr):
    """Tokens ``first`` to ``first + BLOCK_N - 1`` of a page; ``offsets`` from :func:`head_offsets`."""
    start = pages_ptr + page.to(tl.int64) * page_stride * UNIT + first * token_stride * UNIT
    return widen(tl.load(start + offsets), dtype)


@jit
def load_tile_masked(pages_ptr, page, page_stride, first, token_stride, offsets, valid, dtype: tl.constexpr):
    """The same, 0 where not ``valid``: what lies there may be NaN, and 0 x NaN is NaN."""
    start = pages_ptr + page.to(tl.int64) * page_stride * UNIT + first * token_stride * UNIT
    return widen(tl.load(start + offsets, mask=valid[:, None], other=0.0), dtype)
