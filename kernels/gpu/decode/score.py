"""Block scores of short rows: all tokens and index heads of a row against each of its keys once."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...batch import BLOCK_SIZE, Batch
from .. import arch, pdl
from ..fp8 import E4M3_CAPABILITY, loadable, widen
from ..pdl import let_next_start
from ..rows import STEP_ARGUMENTS, live_page
from ..sizes import ceil_div, next_power_of_2
from . import pairs as e4m3
from .pairs import as_pairs, even_channels, odd_channels


class Config(NamedTuple):
    programs: int
    """Programs to start for each multiprocessor."""
    num_warps: int
    num_stages: int


CONFIGS = {
    # (compute capability 9 or more, bytes of an index key's element)
    (False, 1): Config(4, 4, 3),
    (False, 2): Config(2, 4, 2),
    (False, 4): Config(2, 4, 1),
    (True, 1): Config(4, 2, 5),
    (True, 2): Config(4, 2, 3),
    (True, 4): Config(2, 4, 2),
}
COLUMNS = 16
"""The rows of scores are a multiple of so many blocks long; so are their strides, and one compiled kernel serves all"""


def score_blocks(index_q: Tensor, index_k_pages: Tensor, batch: Batch, *, topk: int) -> Tensor:
    """The largest ``index_q . index_k`` over each block's tokens that a query sees.

    Args:
        index_q: ``[num_tokens, num_index_heads, index_dim]``.
        index_k_pages: ``[num_pages, 128, index_dim]``.
        topk: rows of no more blocks than this are not scored, for all their blocks are taken.

    Returns:
        ``[num_index_heads, num_tokens, num_blocks]`` fp32, undefined where nothing is scored.
    """
    num_tokens, num_heads, dim = index_q.shape
    max_blocks = min(ceil_div(batch.max_seq_len, BLOCK_SIZE), batch.block_table.shape[1])
    padded = ceil_div(max_blocks, COLUMNS) * COLUMNS
    scores = torch.empty(num_heads, num_tokens, padded, dtype=torch.float32, device=index_q.device)
    if scores.numel() == 0 or batch.num_seqs == 0:
        return scores
    device = index_q.device
    config = CONFIGS[arch.capability(device) >= (9, 0), index_k_pages.element_size()]
    splits = max(1, min(config.programs * arch.num_sms(device) // batch.num_seqs, max_blocks))
    heads = next_power_of_2(num_heads)
    tokens = next_power_of_2(batch.max_query_len)
    stacked = max(16, tokens * heads)
    if index_q.element_size() == 1 and arch.capability(device) < E4M3_CAPABILITY:
        index_q = index_q.to(torch.float16)
    # Two fp8 operands are multiplied as they are.
    pairs = as_pairs(index_k_pages) if index_q.element_size() > 1 else None
    index_k_pages = loadable(index_k_pages) if pairs is None else pairs
    _score_rows[(splits, batch.num_seqs)](
        index_q,
        index_k_pages,
        scores,
        batch.cu_seqlens_q,
        batch.seq_lens,
        batch.context_lens,
        batch.block_table,
        index_k_pages.shape[0],
        max_blocks,
        topk,
        index_q.stride(0),
        index_q.stride(1),
        index_k_pages.stride(0),
        index_k_pages.stride(1),
        scores.stride(0),
        scores.stride(1),
        batch.block_table.stride(0),
        NUM_HEADS=num_heads,
        HEADS=heads,
        STACKED=stacked,
        DIM=dim,
        BLOCK=BLOCK_SIZE,
        PAIRS=pairs is not None,
        PACKED=e4m3.PACKED,
        PDL=pdl.available(device),
        num_warps=min(8, config.num_warps * max(1, stacked // 32)),
        num_stages=config.num_stages,
    )
    return scores


@triton.jit(do_not_specialize=STEP_ARGUMENTS)
def _score_rows(
    index_q,
    index_k_pages,
    scores,
    cu_seqlens_q,
    seq_lens,
    context_lens,
    block_table,
    num_pages,
    max_blocks,
    topk,
    q_token_stride,
    q_head_stride,
    k_page_stride,
    k_token_stride,
    score_head_stride,
    score_token_stride,
    table_stride,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    STACKED: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
    PACKED: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    split = tl.program_id(0)
    row = tl.program_id(1)
    start = tl.load(cu_seqlens_q + row)
    query_len = tl.load(cu_seqlens_q + row + 1) - start
    context_len = tl.load(context_lens + row)
    seq_len = tl.load(seq_lens + row)
    blocks = tl.minimum(tl.cdiv(tl.minimum(context_len + query_len, seq_len), BLOCK), max_blocks)
    if (blocks <= topk) | (query_len == 0):
        return
    first_block = split * blocks // tl.num_programs(0)
    end_block = (split + 1) * blocks // tl.num_programs(0)

    stacked = tl.arange(0, STACKED)
    offset = stacked // HEADS
    head = stacked % HEADS
    live = (offset < query_len) & (head < NUM_HEADS)
    token = (start + offset).to(tl.int64)
    # Of pairs, even and odd channels are multiplied apart.
    STEP: tl.constexpr = 2 if PAIRS else 1
    channel = tl.arange(0, DIM // STEP)
    q_place = index_q + (token * q_token_stride + head * q_head_stride)[None, :] + channel[:, None] * STEP
    q = tl.load(q_place, mask=live[None, :], other=0.0)
    if PAIRS:
        q_odd = tl.load(q_place + 1, mask=live[None, :], other=0.0)
    elif q.dtype != index_k_pages.dtype.element_ty and index_k_pages.dtype.element_ty.primitive_bitwidth > 8:
        q = q.to(tl.float32)
    sees = tl.minimum(context_len + offset + 1, seq_len)
    key = tl.arange(0, BLOCK)
    k_offsets = key[:, None] * k_token_stride + channel[None, :]
    out = scores + head.to(tl.int64) * score_head_stride + token * score_token_stride
    table = block_table + row.to(tl.int64) * table_stride
    for block in range(first_block, end_block):
        page = live_page(table + block, num_pages).to(tl.int64)
        k = tl.load(index_k_pages + page * k_page_stride + k_offsets)
        if PAIRS:
            dots = tl.dot(even_channels(k, q.dtype, PACKED), q, input_precision="ieee")
            dots = tl.dot(odd_channels(k, q.dtype, PACKED), q_odd, dots, input_precision="ieee")
        else:
            dots = tl.dot(widen(k, q.dtype), q, input_precision="ieee")
        dots = tl.where((block * BLOCK + key)[:, None] < sees[None, :], dots, float("-inf"))
        tl.store(out + block, tl.max(dots, axis=0), mask=live)
