"""Block scores of long rows: a tile of query tokens, all index heads stacked, against each key once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..batch import BLOCK_SIZE, Batch
from . import arch, tma
from .fp8 import loadable, widen
from .rows import STEP_ARGUMENTS, live_page
from .sizes import ceil_div, next_power_of_2

COLUMNS = 8
"""Blocks whose scores are stored together: one 32-byte sector a row."""
TILE_ROWS = 128
"""Rows of a tile: tokens times index heads. 64 are bound by reading keys from L2, 256 leave one program to an SM and
nothing to do while it takes its maxima."""
WAVES = 4
"""Programs that an SM runs one after the other, two at a time: enough that all end at about the same time."""
NUM_STAGES = 3


def num_warps(element_size: int) -> int:
    """Of keys of one byte a product takes half the time, and four warps that hold more of a row each, and so take its
    maximum with fewer shuffles, beat eight by a quarter. Wider keys leave them too few registers."""
    return 4 if element_size == 1 else 8


def score_blocks(index_q: Tensor, index_k_pages: Tensor, batch: Batch, *, topk: int, local_blocks: int) -> Tensor:
    """The largest ``index_q . index_k`` over each block, for query tokens that see more than ``topk`` blocks.

    Args:
        index_q: ``[num_tokens, num_index_heads, index_dim]``.
        index_k_pages: ``[num_pages, 128, index_dim]``, any float dtype; the products are taken in that of ``index_q``.
        topk, local_blocks: what need not be scored: tokens that see no more than ``topk`` blocks, and
            their own block if it is forced in.

    Returns:
        ``[num_index_heads, num_tokens, num_blocks]`` fp32, ``num_blocks`` a multiple of 8. Undefined where nothing is
        scored.
    """
    num_tokens, num_heads, dim = index_q.shape
    max_blocks = min(ceil_div(batch.max_seq_len, BLOCK_SIZE), batch.block_table.shape[1])
    num_blocks = ceil_div(max_blocks, COLUMNS) * COLUMNS
    # Strides are multiples of 16 in every step, so that one compiled kernel serves all.
    width = ceil_div(num_blocks, 16) * 16
    scores = torch.empty(num_heads, num_tokens, width, dtype=torch.float32, device=index_q.device)[..., :num_blocks]

    padded_heads = next_power_of_2(num_heads)
    tile_tokens = max(1, TILE_ROWS // padded_heads)
    tiles = ceil_div(batch.max_query_len, tile_tokens)
    wanted = 2 * WAVES * arch.num_sms(index_q.device)
    splits = max(1, min(num_blocks // COLUMNS, wanted // max(1, tiles * batch.num_seqs)))
    split_blocks = ceil_div(num_blocks // COLUMNS, splits) * COLUMNS
    index_k_pages = loadable(index_k_pages)
    keys = tma.descriptor(index_k_pages, [1, BLOCK_SIZE, dim])
    _score_kernel[(tiles, ceil_div(num_blocks, split_blocks), batch.num_seqs)](
        index_q,
        index_k_pages if keys is None else keys,
        scores,
        batch.cu_seqlens_q,
        batch.context_lens,
        batch.seq_lens,
        batch.block_table,
        index_q.stride(0),
        index_q.stride(1),
        index_k_pages.stride(0),
        index_k_pages.stride(1),
        scores.stride(0),
        scores.stride(1),
        batch.block_table.stride(0),
        split_blocks,
        max_blocks,
        index_k_pages.shape[0],
        topk,
        NUM_HEADS=num_heads,
        PADDED_HEADS=padded_heads,
        TILE_TOKENS=tile_tokens,
        DIM=dim,
        BLOCK=BLOCK_SIZE,
        COLUMNS=COLUMNS,
        SCORE_OWN=local_blocks == 0,
        TMA=keys is not None,
        num_warps=num_warps(index_q.element_size()),
        num_stages=NUM_STAGES,
    )
    return scores


@triton.jit(do_not_specialize=STEP_ARGUMENTS)
def _score_kernel(
    index_q,
    index_k_pages,
    scores,
    cu_seqlens_q,
    context_lens,
    seq_lens,
    block_table,
    q_token_stride,
    q_head_stride,
    k_page_stride,
    k_token_stride,
    score_head_stride,
    score_token_stride,
    table_stride,
    split_blocks,
    max_blocks,
    num_pages,
    topk,
    NUM_HEADS: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCORE_OWN: tl.constexpr,
    TMA: tl.constexpr,
):
    row = tl.program_id(2)
    start = tl.load(cu_seqlens_q + row)
    query_len = tl.load(cu_seqlens_q + row + 1) - start
    tile = tl.cdiv(query_len, TILE_TOKENS) - 1 - tl.program_id(0)  # the longest first
    if tile < 0 or tl.load(seq_lens + row) == 0:
        return
    first = tile * TILE_TOKENS
    context_len = tl.load(context_lens + row)
    last_position = context_len + tl.minimum(first + TILE_TOKENS, query_len) - 1
    if last_position < topk * BLOCK:
        return
    # A block that any token of the tile shares with its own end is forced in for that token. So no score that counts
    # needs a causal mask, and no key past the sequence's end is read, unless no local block is forced.
    own_block = last_position // BLOCK
    split_start = tl.program_id(1) * split_blocks
    split_end = tl.minimum(split_start + split_blocks, tl.minimum(own_block + (1 if SCORE_OWN else 0), max_blocks))
    if split_start >= split_end:
        return

    stacked = tl.arange(0, TILE_TOKENS * PADDED_HEADS)
    offset = first + stacked // PADDED_HEADS
    head = stacked % PADDED_HEADS
    live = (offset < query_len) & (head < NUM_HEADS)
    token = (start + offset).to(tl.int64)
    channel = tl.arange(0, DIM)
    q = tl.load(
        index_q + token[:, None] * q_token_stride + head[:, None] * q_head_stride + channel[None, :],
        mask=live[:, None],
        other=0.0,
    )
    key = tl.arange(0, BLOCK)
    column = tl.arange(0, COLUMNS)
    row_scores = scores + head.to(tl.int64) * score_head_stride + token * score_token_stride
    table = block_table + row.to(tl.int64) * table_stride
    kept = tl.zeros([TILE_TOKENS * PADDED_HEADS, COLUMNS], dtype=tl.float32)
    for block in range(split_start, split_end):
        page = live_page(table + block, num_pages)
        if TMA:
            k = tl.trans(widen(index_k_pages.load([page, 0, 0]).reshape(BLOCK, DIM), index_q.dtype.element_ty))
        else:
            k_block = index_k_pages + page.to(tl.int64) * k_page_stride
            k = tl.load(k_block + key[None, :] * k_token_stride + channel[:, None])
            k = widen(k, index_q.dtype.element_ty)
        dots = tl.dot(q, k, input_precision="ieee")
        if SCORE_OWN:
            hidden = block * BLOCK + key[None, :] > (context_len + offset)[:, None]
            dots = tl.where(hidden, float("-inf"), dots)
        kept = tl.where(column[None, :] == block % COLUMNS, tl.max(dots, axis=1)[:, None], kept)
        if (block % COLUMNS == COLUMNS - 1) | (block == split_end - 1):
            place = block // COLUMNS * COLUMNS + column
            tl.store(row_scores[:, None] + place[None, :], kept, mask=live[:, None] & (place <= block)[None, :])
