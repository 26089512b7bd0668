"""Block scores: the index queries of some tokens, all heads stacked, against each index key of their context once.

A work item of the step's plan is a tile of neighbouring query tokens and a stretch of blocks. Two ways through it:

- *few rows* (tokens times heads), as in decode: bound by reading the keys, so keys are the rows of the product and
  queries its columns;
- *many rows*, as in prefill: bound by the product, so queries are the rows, the maximum over a block stays within a
  warp, and the scores of 8 blocks leave together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton import jit

from ..batch import BLOCK_SIZE, Batch
from ..caches import LayerCaches
from ..selection import Selection
from . import arch, pairs, pdl
from .fp8 import E4M3_CAPABILITY, widen
from .launch import Launch, Options, kernel
from .pages import Pages, units
from .pairs import even_channels, odd_channels
from .pdl import let_next_start
from .plan import ITEM_FIELDS, NUM_ITEMS, Plan
from .sizes import ceil_div, next_power_of_2
from .tiles import UNIT, live_page
from .workspace import workspace_of

COLUMNS = 8
"""Blocks whose scores are stored together: one 32-byte sector a row."""


class Config(NamedTuple):
    """How a step is scored.

    Attributes:
        few_rows: of a tile that is taken the first way; 0 for none.
        many_rows: of a tile that is taken the second way; 0 for none.
        programs_per_sm: to start for each multiprocessor.
        tma: whether keys come by bulk copies.
    """

    few_rows: int
    many_rows: int
    programs_per_sm: int
    num_warps: int
    num_stages: int
    tma: bool = False


MOST_FEW_ROWS = 64
DECODE = {
    # (compute capability 9 or more, bytes of an index key's element): programs, warps, stages
    (False, 1): (4, 4, 3),
    (False, 2): (2, 4, 2),
    (False, 4): (2, 4, 1),
    (True, 1): (4, 2, 5),
    (True, 2): (4, 2, 2),
    (True, 4): (2, 4, 2),
}
MIXED_TOKENS = 512
"""Steps of up to so many tokens may be of any mix, decode steps among them; longer ones are prompts."""
MIXED = Config(few_rows=16, many_rows=128, programs_per_sm=2, num_warps=8, num_stages=3, tma=True)
PREFILL_ROWS = 128
"""64 are bound by reading keys from L2, 256 leave one program to an SM and nothing to do while it takes its maxima."""
PREFILL_PROGRAMS = 8
"""Four that an SM runs one after the other, two at a time: enough that all end at about the same time."""


def config_of(index_q: Tensor, caches: LayerCaches, batch: Batch) -> Config:
    """The one for this step, from shapes alone."""
    heads = next_power_of_2(index_q.shape[1])
    rows = max(16, next_power_of_2(batch.max_query_len) * heads)
    hopper = arch.capability(index_q.device) >= (9, 0)
    pages = caches.index_k_pages
    assert pages is not None
    if rows <= MOST_FEW_ROWS:
        programs, num_warps, num_stages = DECODE[hopper, pages.element_size()]
        return Config(rows, 0, programs, min(8, num_warps * max(1, rows // 32)), num_stages)
    if index_q.shape[0] <= MIXED_TOKENS:
        return MIXED
    # Of keys of one byte a product takes half the time, and four warps that hold more of a row each, and so take its
    # maximum with fewer shuffles, beat eight by a quarter. Wider keys leave them too few registers.
    num_warps = 4 if index_q.element_size() == 1 else 8
    return Config(0, PREFILL_ROWS, PREFILL_PROGRAMS, num_warps, 3, tma=True)


def tile_tokens(config: Config, num_heads: int) -> int:
    """Most tokens of a tile."""
    return max(1, max(config.few_rows, config.many_rows) // next_power_of_2(num_heads))


def programs(config: Config, device: torch.device) -> int:
    """Programs that keep the chip busy."""
    return config.programs_per_sm * arch.num_sms(device)


def score_blocks(
    index_q: Tensor, caches: LayerCaches, batch: Batch, selection: Selection, plan: Plan, config: Config
) -> tuple[Tensor, Launch]:
    """The largest ``index_q . index_k`` over each block, for query tokens that see more than ``topk`` blocks.

    Args:
        index_q: ``[num_tokens, num_index_heads, index_dim]``; the products are taken in its dtype.

    Returns:
        ``[num_index_heads, num_tokens, num_blocks]`` fp32 of the blocks of the plan's share, ``num_blocks`` a multiple
        of 16, and the launch that fills it. Undefined where nothing is scored: blocks that the query does not see, and
        its own if that is forced in.
    """
    num_tokens, num_heads, dim = index_q.shape
    share = plan.shape.share
    num_blocks = ceil_div(ceil_div(batch.max_blocks, share.ranks), 16) * 16
    scores = workspace_of(batch).hold("scores", num_heads * num_tokens * num_blocks, torch.float32)
    scores = scores.view(num_heads, num_tokens, num_blocks)
    pages = caches.keep(Pages)
    keys = pages.index_k
    # Two fp8 operands are multiplied as they are.
    paired = pages.index_pairs if config.few_rows and index_q.element_size() > 1 else None
    descriptor = pages.index_k_desc if config.tma else None
    launch = msa_score(
        (plan.max_items,),
        (
            index_q, keys, keys if paired is None else paired, keys if descriptor is None else descriptor, scores,
            plan.counts, plan.items,
            batch.block_table, pages.num_pages,
            *units("index_q", index_q.stride()[:2]), *pages.index_strides, scores.stride(0) // 16, num_blocks // 16,
            batch.block_table.stride(0), share.rank,
        ),
        (
            num_heads, next_power_of_2(num_heads), config.few_rows, config.many_rows, dim, BLOCK_SIZE, COLUMNS,
            selection.local_blocks == 0, share.ranks, paired is not None, pairs.PACKED, descriptor is not None,
            pdl.available(index_q.device),
        ),
        Options(config.num_warps, config.num_stages),
    )  # fmt: skip
    return scores, launch


def multiplicable(index_q: Tensor) -> Tensor:
    """Index queries in a dtype that the GPU multiplies."""
    if index_q.element_size() == 1 and arch.capability(index_q.device) < E4M3_CAPABILITY:
        return index_q.to(torch.float16)
    return index_q


@kernel(unaligned=("block_table_ptr",))
def msa_score(
    index_q_ptr, index_k_ptr, pairs_ptr, index_k_desc, scores_ptr, counts_ptr, items_ptr, block_table_ptr, num_pages,
    q_token_stride, q_head_stride, k_page_stride, k_token_stride, score_head_stride, score_token_stride, table_stride,
    rank,
    NUM_HEADS: tl.constexpr, HEADS: tl.constexpr, FEW_ROWS: tl.constexpr, MANY_ROWS: tl.constexpr, DIM: tl.constexpr,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, SCORE_OWN: tl.constexpr, RANKS: tl.constexpr, PAIRS: tl.constexpr,
    PACKED: tl.constexpr, TMA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # Not launched so itself: see :mod:`.pdl`.
    let_next_start(PDL)
    item = tl.program_id(0)
    num_items = tl.load(counts_ptr + NUM_ITEMS)
    # One wait for all of them: there is memory, if not an item, for every program.
    items_ptr += item * ITEM_FIELDS
    seq = tl.load(items_ptr)
    token = tl.load(items_ptr + 1)
    count = tl.load(items_ptr + 2)
    position = tl.load(items_ptr + 3)
    begin = tl.load(items_ptr + 4)
    end = tl.load(items_ptr + 5)
    if item >= num_items:
        return
    # From here on blocks and positions count from the share's first block.
    table_ptr = block_table_ptr + seq.to(tl.int64) * table_stride + rank
    if FEW_ROWS > 0 and (MANY_ROWS == 0 or count * HEADS <= FEW_ROWS):
        _score_few(
            index_q_ptr, pairs_ptr, scores_ptr, table_ptr, num_pages, q_token_stride, q_head_stride, k_page_stride,
            k_token_stride, score_head_stride, score_token_stride, token, count, position - rank * BLOCK, begin, end,
            NUM_HEADS, HEADS, FEW_ROWS, DIM, BLOCK, SCORE_OWN, RANKS, PAIRS, PACKED,
        )  # fmt: skip
    elif MANY_ROWS > 0:
        _score_many(
            index_q_ptr, index_k_ptr, index_k_desc, scores_ptr, table_ptr, num_pages, q_token_stride, q_head_stride,
            k_page_stride, k_token_stride, score_head_stride, score_token_stride, token, count, position - rank * BLOCK,
            begin, end, NUM_HEADS, HEADS, MANY_ROWS, DIM, BLOCK, COLUMNS, SCORE_OWN, RANKS, TMA,
        )  # fmt: skip


@jit
def _score_few(
    index_q_ptr, index_k_ptr, scores_ptr, table_ptr, num_pages, q_token_stride, q_head_stride, k_page_stride,
    k_token_stride, score_head_stride, score_token_stride, first_token, count, position, begin, end,
    NUM_HEADS: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    SCORE_OWN: tl.constexpr, RANKS: tl.constexpr, PAIRS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, ROWS)
    offset = row // HEADS
    head = row % HEADS
    live = (offset < count) & (head < NUM_HEADS)
    token = (first_token + offset).to(tl.int64)
    # Of pairs, even and odd channels are multiplied apart.
    STEP: tl.constexpr = 2 if PAIRS else 1
    channel = tl.arange(0, DIM // STEP)
    q_ptrs = index_q_ptr + (token * q_token_stride + head * q_head_stride)[None, :] * UNIT + channel[:, None] * STEP
    q = tl.load(q_ptrs, mask=live[None, :], other=0.0)
    if PAIRS:
        q_odd = tl.load(q_ptrs + 1, mask=live[None, :], other=0.0)
    elif q.dtype != index_k_ptr.dtype.element_ty and index_k_ptr.dtype.element_ty.primitive_bitwidth > 8:
        q = q.to(tl.float32)
    key = tl.arange(0, BLOCK)
    k_offsets = key[:, None] * (k_token_stride * (UNIT // STEP)) + channel[None, :]
    out_ptrs = scores_ptr + (head.to(tl.int64) * score_head_stride + token * score_token_stride) * UNIT
    for block in range(begin, end):
        page = live_page(table_ptr + block * RANKS, num_pages).to(tl.int64)
        k = tl.load(index_k_ptr + page * (k_page_stride * (UNIT // STEP)) + k_offsets)
        if PAIRS:
            dots = tl.dot(even_channels(k, q.dtype, PACKED), q, input_precision="ieee")
            dots = tl.dot(odd_channels(k, q.dtype, PACKED), q_odd, dots, input_precision="ieee")
        else:
            dots = tl.dot(widen(k, q.dtype), q, input_precision="ieee")
        if SCORE_OWN:
            seen = (block * RANKS * BLOCK + key)[:, None] <= (position + offset)[None, :]
            dots = tl.where(seen, dots, float("-inf"))
        tl.store(out_ptrs + block, tl.max(dots, axis=0), mask=live)


@jit
def _score_many(
    index_q_ptr, index_k_ptr, index_k_desc, scores_ptr, table_ptr, num_pages, q_token_stride, q_head_stride,
    k_page_stride, k_token_stride, score_head_stride, score_token_stride, first_token, count, position, begin, end,
    NUM_HEADS: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr, SCORE_OWN: tl.constexpr, RANKS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    # A block that any token of the tile shares with its own end is forced in for that token. So no score that counts
    # needs a causal mask, and no key past the sequence's end is read, unless no local block is forced.
    row = tl.arange(0, ROWS)
    offset = row // HEADS
    head = row % HEADS
    live = (offset < count) & (head < NUM_HEADS)
    token = (first_token + offset).to(tl.int64)
    channel = tl.arange(0, DIM)
    q = tl.load(
        index_q_ptr + (token * q_token_stride + head * q_head_stride)[:, None] * UNIT + channel[None, :],
        mask=live[:, None],
        other=0.0,
    )
    key = tl.arange(0, BLOCK)
    column = tl.arange(0, COLUMNS)
    out_ptrs = scores_ptr + (head.to(tl.int64) * score_head_stride + token * score_token_stride) * UNIT
    kept = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for block in range(begin, end):
        page = live_page(table_ptr + block * RANKS, num_pages)
        if TMA:
            k = tl.trans(widen(index_k_desc.load([page, 0, 0]).reshape(BLOCK, DIM), q.dtype))
        else:
            k_ptrs = index_k_ptr + page.to(tl.int64) * k_page_stride * UNIT + channel[:, None]
            k = widen(tl.load(k_ptrs + key[None, :] * (k_token_stride * UNIT)), q.dtype)
        dots = tl.dot(q, k, input_precision="ieee")
        if SCORE_OWN:
            seen = block * RANKS * BLOCK + key[None, :] <= (position + offset)[:, None]
            dots = tl.where(seen, dots, float("-inf"))
        kept = tl.where(column[None, :] == block % COLUMNS, tl.max(dots, axis=1)[:, None], kept)
        if (block % COLUMNS == COLUMNS - 1) | (block == end - 1):
            place = block // COLUMNS * COLUMNS + column
            mask = live[:, None] & (place >= begin)[None, :] & (place <= block)[None, :]
            tl.store(out_ptrs[:, None] + place[None, :], kept, mask=mask)
