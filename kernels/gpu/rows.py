"""Where a query token belongs and where a page lies, read on the device."""

from __future__ import annotations

import triton
import triton.language as tl

STEP_ARGUMENTS = (
    "cu_seqlens_q", "seq_lens", "context_lens", "block_table", "table_stride", "items", "num_items",
    "num_tokens", "num_seqs", "num_pages", "max_blocks", "split_blocks", "selections", "num_lists", "list_tokens",
    "num_keys", "max_items", "search_steps", "max_positions", "near_blocks", "topk", "ids_head_stride",
    "splits", "share",
)  # fmt: skip
"""Kernel arguments that differ from step to step. Triton would compile a kernel again when one of them is 1, becomes a
multiple of 16, or points into the middle of a tensor, while somebody waits."""


def search_steps(num_seqs: int) -> int:
    """``search_steps`` of :func:`locate` for this many rows."""
    return max(1, num_seqs).bit_length()


@triton.jit
def locate(tokens, cu_seqlens_q, context_lens, seq_lens, num_seqs, search_steps):
    """Row, position in its sequence and sequence length of each token. Padding has the position -1 and the length 0."""
    low = tokens * 0  # the last row that starts at or before the token
    high = low + num_seqs
    for _ in range(search_steps):
        middle = (low + high + 1) // 2
        starts_before = tl.load(cu_seqlens_q + middle) <= tokens
        low = tl.where(starts_before, middle, low)
        high = tl.where(starts_before, high, middle - 1)
    live = low < num_seqs
    row = tl.minimum(low, num_seqs - 1)
    seq_len = tl.load(seq_lens + row, mask=live, other=0)
    position = tl.load(context_lens + row, mask=live, other=0) + tokens - tl.load(cu_seqlens_q + row)
    return row, tl.where(live & (seq_len > 0), position, -1), seq_len


@triton.jit
def live_page(entry, num_pages):
    """The page in a block table's entry. A row longer than its table was filled for reads some page, but no fault."""
    return tl.minimum(tl.maximum(tl.load(entry), 0), num_pages - 1)
