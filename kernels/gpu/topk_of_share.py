"""Top-k where each rank scores a share of the blocks: the best of a share, and the best of all shares' best.

What is among the k best of all blocks is among the k best of its share. So a rank hands on no more than k candidates
of its share, each with a key in the order of its score, and whoever has all of them finds exactly what one rank alone
would have: the same scores, compared by the same keys. Forced blocks are no candidates; they are put in at the end.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from ..batch import BLOCK_SIZE, Batch
from ..selection import Selection
from . import pdl
from .launch import Launch, Options, kernel
from .pdl import let_next_start, wait_for_previous
from .plan import Plan, of_share
from .sizes import ceil_div, next_power_of_2
from .tiles import UNIT
from .topk import LOWEST_KEY, ordered, put_best, put_greatest, rounds_of, with_forced


def topk_of_share(scores: Tensor | None, batch: Batch, selection: Selection, plan: Plan, candidates: Tensor) -> Launch:
    """The launch that finds the best free blocks of the plan's share.

    Args:
        scores: as :func:`.score.score_blocks` returns them; None if no token sees more than ``topk`` blocks.
        candidates: ``[2, num_heads, num_tokens, topk]`` int32, contiguous, to be filled: keys and block numbers, those
            of none :data:`.topk.LOWEST_KEY` and -1.
    """
    _, num_heads, num_tokens, topk = candidates.shape
    share = plan.shape.share
    rounds = rounds_of(ceil_div(batch.max_blocks, share.ranks), num_tokens * num_heads, candidates.device)
    strides = (0, 0) if scores is None else (scores.stride(0) // 16, scores.stride(1) // 16)
    dependent = pdl.available(candidates.device) and scores is not None
    return msa_topk_of_share(
        (num_tokens, num_heads),
        (
            candidates if scores is None else scores, candidates, plan.token_pos, num_tokens, batch.max_blocks,
            share.rank, *strides,
        ),
        (
            share.ranks, topk, next_power_of_2(topk), selection.init_blocks, selection.local_blocks, scores is not None,
            *rounds, BLOCK_SIZE, dependent,
        ),
        Options(num_warps=rounds.unroll, pdl=dependent),
    )  # fmt: skip


def merge_topk(candidates: Tensor, batch: Batch, selection: Selection, plan: Plan, block_ids: Tensor) -> Launch:
    """The launch that chooses ``topk`` blocks a token from the candidates of all shares.

    Args:
        candidates: ``[ranks, 2, num_heads, num_tokens, topk]`` int32; the last two axes contiguous.
        block_ids: ``[num_heads, num_tokens, topk]`` int32, contiguous, to be filled.
    """
    ranks, _, num_heads, num_tokens, topk = candidates.shape
    return msa_merge_topk(
        (num_tokens, num_heads),
        (
            candidates, block_ids, plan.token_pos, num_tokens, batch.max_blocks, candidates.stride(0),
            candidates.stride(1), candidates.stride(2),
        ),
        (
            ranks, next_power_of_2(ranks), topk, next_power_of_2(topk), selection.init_blocks, selection.local_blocks,
            BLOCK_SIZE,
        ),
        Options(num_warps=1),
    )  # fmt: skip


@kernel()
def msa_topk_of_share(
    scores_ptr, candidates_ptr, token_pos_ptr, num_tokens, max_blocks, rank, head_stride, token_stride,
    RANKS: tl.constexpr, TOPK: tl.constexpr, TOPK_PADDED: tl.constexpr, INIT_BLOCKS: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr, HAS_SCORES: tl.constexpr, NUM_BLOCKS: tl.constexpr, NUM_STEPS: tl.constexpr,
    GROUPS: tl.constexpr, GROUP_RUN: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    head = tl.program_id(1)
    # The plan was made before scoring began.
    position = tl.load(token_pos_ptr + token)
    wait_for_previous(PDL)
    let_next_start(PDL)
    visible = tl.minimum((position + BLOCK) // BLOCK, max_blocks)
    keys = candidates_ptr + (head * num_tokens + token).to(tl.int64) * TOPK
    blocks = keys + tl.num_programs(1).to(tl.int64) * num_tokens * TOPK
    slot = tl.arange(0, TOPK_PADDED)
    is_slot = slot < TOPK
    if (visible <= TOPK) | (not HAS_SCORES):
        tl.store(keys + slot, slot * 0 + LOWEST_KEY, mask=is_slot)
        tl.store(blocks + slot, slot * 0 - 1, mask=is_slot)
    else:
        k = TOPK - INIT_BLOCKS - LOCAL_BLOCKS
        first_free = of_share(INIT_BLOCKS + position * 0, rank, RANKS)
        end_free = of_share(visible - LOCAL_BLOCKS, rank, RANKS)
        token_scores = scores_ptr + (head.to(tl.int64) * head_stride + token.to(tl.int64) * token_stride) * UNIT
        # A share may have fewer than k.
        tl.store(blocks + slot, slot * 0 - 1, mask=is_slot)
        tl.debug_barrier()
        put_best(
            token_scores, blocks, end_free, first_free, end_free, k, TOPK, TOPK_PADDED, NUM_BLOCKS, NUM_STEPS, GROUPS,
            GROUP_RUN, UNROLL,
        )  # fmt: skip
        tl.debug_barrier()
        found = tl.load(blocks + slot, mask=slot < k, other=-1)
        tl.debug_barrier()
        there = (found >= first_free) & (found < end_free)
        score = tl.load(token_scores + found, mask=there, other=0.0)
        tl.store(keys + slot, tl.where(there, ordered(score), LOWEST_KEY), mask=is_slot)
        tl.store(blocks + slot, tl.where(there, found * RANKS + rank, -1), mask=is_slot)


@kernel(unaligned=("candidates_ptr",))
def msa_merge_topk(
    candidates_ptr, block_ids_ptr, token_pos_ptr, num_tokens, max_blocks, rank_stride, kind_stride, head_stride,
    RANKS: tl.constexpr, RANKS_PADDED: tl.constexpr, TOPK: tl.constexpr, TOPK_PADDED: tl.constexpr,
    INIT_BLOCKS: tl.constexpr, LOCAL_BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    head = tl.program_id(1)
    position = tl.load(token_pos_ptr + token)
    visible = tl.minimum((position + BLOCK) // BLOCK, max_blocks)
    chosen = block_ids_ptr + (head * num_tokens + token).to(tl.int64) * TOPK
    slot = tl.arange(0, TOPK_PADDED)
    if visible <= TOPK:
        tl.store(chosen + slot, tl.where(slot < visible, slot, -1), mask=slot < TOPK)
    else:
        entry = tl.arange(0, RANKS_PADDED * TOPK_PADDED)
        of_rank = entry // TOPK_PADDED
        there = (of_rank < RANKS) & (entry % TOPK_PADDED < TOPK)
        keys = candidates_ptr + head.to(tl.int64) * head_stride + token.to(tl.int64) * TOPK
        keys += of_rank.to(tl.int64) * rank_stride + entry % TOPK_PADDED
        key = tl.load(keys, mask=there, other=LOWEST_KEY)
        block = tl.load(keys + kind_stride, mask=there, other=-1)
        put_greatest(key, TOPK - INIT_BLOCKS - LOCAL_BLOCKS, block, chosen)
        with_forced(chosen, visible, TOPK, TOPK_PADDED, INIT_BLOCKS, LOCAL_BLOCKS)
