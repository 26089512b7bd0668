"""Block scores of long rows: every index head of a token tile against each key once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..batch import BLOCK_SIZE, Batch
from . import arch

COLUMNS = 8
"""Blocks whose scores are stored together: one 32-byte sector a row."""

CONFIG = {
    # (index heads in a tile, bytes of an element): rows of a tile (tokens x heads), warps, stages
    "rows": 128,
    "num_warps": 8,
    "num_stages": 3,
}


def score_blocks(
    index_q: Tensor,
    index_k_pages: Tensor,
    batch: Batch,
    *,
    topk: int,
    local_blocks: int,
) -> Tensor:
    """The largest ``index_q . index_k`` over each block, for query tokens that see more than ``topk`` blocks.

    Args:
        index_q: ``[num_tokens, num_index_heads, index_dim]``.
        index_k_pages: ``[num_pages, 128, index_dim]``.
        topk: tokens that see no more blocks than this are not scored.
        local_blocks: if at least 1, a token's own block is taken whatever it scores and is not scored.

    Returns:
        ``[num_index_heads, num_tokens, num_blocks]`` fp32. Undefined where nothing is scored.
    """
    num_tokens, num_heads, dim = index_q.shape
    num_blocks = triton.cdiv(batch.max_seq_len, BLOCK_SIZE)
    padded = triton.cdiv(num_blocks, COLUMNS) * COLUMNS
    scores = index_q.new_empty((num_heads, num_tokens, padded), dtype=torch.float32)

    heads = triton.next_power_of_2(num_heads)
    tile_tokens = max(1, CONFIG["rows"] // heads)
    tiles = triton.cdiv(batch.max_query_len, tile_tokens)
    # A few waves of programs keep the chip full to the end; the split decides nothing else.
    wanted = 8 * arch.num_sms(index_q.device)
    splits = min(triton.cdiv(padded, COLUMNS), max(1, wanted // (tiles * batch.num_seqs)))
    split_blocks = triton.cdiv(triton.cdiv(padded, splits), COLUMNS) * COLUMNS
    grid = (tiles, triton.cdiv(padded, split_blocks), batch.num_seqs)
    _score_kernel[grid](
        index_q,
        index_k_pages,
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
        topk,
        NUM_HEADS=num_heads,
        HEADS=heads,
        TILE_TOKENS=tile_tokens,
        DIM=dim,
        BLOCK=BLOCK_SIZE,
        COLUMNS=COLUMNS,
        SCORE_OWN=local_blocks == 0,
        num_warps=CONFIG["num_warps"],
        num_stages=CONFIG["num_stages"],
    )
    return scores


@triton.jit
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
    topk,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCORE_OWN: tl.constexpr,
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
    own_block = last_position // BLOCK
    split_start = tl.program_id(1) * split_blocks
    split_end = tl.minimum(split_start + split_blocks, own_block + 1 if SCORE_OWN else own_block)
    if split_start >= split_end:
        return

    stacked = tl.arange(0, TILE_TOKENS * HEADS)
    offset = first + stacked // HEADS
    head = stacked % HEADS
    live = (offset < query_len) & (head < NUM_HEADS)
    token = (start + offset).to(tl.int64)
    channel = tl.arange(0, DIM)
    q = tl.load(
        index_q + token[:, None] * q_token_stride + head[:, None] * q_head_stride + channel[None, :],
        mask=live[:, None],
        other=0.0,
    )
    key = tl.arange(0, BLOCK)
    k_offsets = key[None, :] * k_token_stride + channel[:, None]
    column = tl.arange(0, COLUMNS)
    row_scores = scores + head.to(tl.int64) * score_head_stride + token * score_token_stride
    table = block_table + row.to(tl.int64) * table_stride
    kept = tl.zeros([TILE_TOKENS * HEADS, COLUMNS], dtype=tl.float32)
    for block in range(split_start, split_end):
        page = tl.load(table + block).to(tl.int64)
        k = tl.load(index_k_pages + page * k_page_stride + k_offsets)
        dots = tl.dot(q, k, input_precision="ieee")
        if SCORE_OWN:
            hidden = block * BLOCK + key[None, :] > (context_len + offset)[:, None]
            dots = tl.where(hidden, float("-inf"), dots)
        kept = tl.where(column[None, :] == block % COLUMNS, tl.max(dots, axis=1)[:, None], kept)
        if (block % COLUMNS == COLUMNS - 1) | (block == split_end - 1):
            place = block // COLUMNS * COLUMNS + column
            tl.store(row_scores[:, None] + place[None, :], kept, mask=live[:, None] & (place <= block)[None, :])
