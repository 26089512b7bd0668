"""The best-scoring blocks of each query token, without a sort.

One program chooses for one (index head, token). It streams the token's scores once, keeping the maxima of some hundred
groups of blocks: the k best blocks lie in the k groups with the greatest maxima, since every other block is no better
than the k-th of those, and each of the k groups holds one as good as it. So only the blocks of k groups are read again.
In both rounds the k-th greatest value is found bit by bit, by counting, which within a single warp is one instruction.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton import jit

from ..batch import BLOCK_SIZE, Batch
from ..selection import Selection
from . import arch, pdl
from .launch import Launch, Options, kernel
from .pdl import let_next_start, wait_for_previous
from .plan import Plan
from .sizes import ceil_div, next_power_of_2
from .tiles import UNIT

SINGLE_ROUND_BLOCKS = 512
"""Up to so many visible blocks are compared directly, without groups."""
MANY_BLOCKS = 4096
GROUPS = 256
GROUPS_OF_MANY = 512
"""Groups above ``MANY_BLOCKS``: twice the maxima to compare, half the blocks to read again."""
LOWEST_KEY = tl.constexpr(-0x80000000)
"""Of what is not there. As bits: the sign."""
GROUP_RUN = 4
"""Neighbouring blocks in a group, one 16-byte load; the rest of it lies at multiples of ``groups * GROUP_RUN``."""


def select_topk(scores: Tensor | None, batch: Batch, selection: Selection, plan: Plan, block_ids: Tensor) -> Launch:
    """The launch that chooses ``topk`` blocks a token: those forced in, then those with the greatest scores.

    Args:
        scores: ``[num_heads, num_tokens, blocks]`` fp32, ``blocks`` and all strides but the last multiples of 16. Only
            a token's visible blocks need be there. NaN ranks below all else. May be None if ``max_seq_len`` makes every
            visible block fit in ``topk``.
        block_ids: ``[num_heads, num_tokens, topk]`` int32, contiguous, to be filled.
    """
    num_heads, num_tokens, topk = block_ids.shape
    max_blocks = batch.max_blocks
    if max_blocks <= topk:
        scores = None
    elif scores is None:
        raise ValueError(f"{max_blocks} blocks may be visible, but top-k is {topk}; pass scores")
    rounds = rounds_of(max_blocks, num_tokens * num_heads, block_ids.device)
    dependent = pdl.available(block_ids.device)
    strides = (0, 0) if scores is None else (scores.stride(0) // 16, scores.stride(1) // 16)
    return msa_topk(
        (num_tokens, num_heads),
        (block_ids if scores is None else scores, block_ids, plan.token_pos, num_tokens, max_blocks, *strides),
        (
            topk, next_power_of_2(topk), selection.init_blocks, selection.local_blocks, scores is not None, *rounds,
            BLOCK_SIZE, dependent,
        ),
        Options(num_warps=rounds.unroll, pdl=dependent),
    )  # fmt: skip


class Rounds(NamedTuple):
    """How a row of scores is looked through; constants of :func:`put_best`, in its order.

    Attributes:
        single: up to so many blocks are compared in one round.
        steps: blocks of a group in runs, rounded up; 0 if one round does for all.
        groups: of the first round of two.
        run: neighbouring blocks of a group.
        unroll: loads of a row on their way, and warps of a program.
    """

    single: int
    steps: int
    groups: int
    run: int
    unroll: int


def rounds_of(num_blocks: int, programs: int, device: torch.device) -> Rounds:
    """For rows of up to ``num_blocks`` scores, one to a program."""
    groups = GROUPS if num_blocks <= MANY_BLOCKS else GROUPS_OF_MANY
    single = max(32, min(SINGLE_ROUND_BLOCKS, next_power_of_2(num_blocks)))
    two = num_blocks > SINGLE_ROUND_BLOCKS
    steps = next_power_of_2(ceil_div(num_blocks, groups * GROUP_RUN)) if two else 0
    # Few programs on an idle chip are waited for one by one: more warps each, to stream a long row.
    few = num_blocks > MANY_BLOCKS and programs <= arch.num_sms(device)
    return Rounds(single, steps, groups, GROUP_RUN, 4 if few else 1)


@kernel()
def msa_topk(
    scores_ptr, block_ids_ptr, token_pos_ptr, num_tokens, max_blocks, head_stride, token_stride,
    TOPK: tl.constexpr, TOPK_PADDED: tl.constexpr, INIT_BLOCKS: tl.constexpr, LOCAL_BLOCKS: tl.constexpr,
    HAS_SCORES: tl.constexpr, NUM_BLOCKS: tl.constexpr, NUM_STEPS: tl.constexpr, GROUPS: tl.constexpr,
    GROUP_RUN: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    head = tl.program_id(1)
    # What came before scoring is done; without scoring, nothing need be.
    if not HAS_SCORES:
        wait_for_previous(PDL)
    position = tl.load(token_pos_ptr + token)
    wait_for_previous(PDL)
    let_next_start(PDL)
    # Of padding, whose position is -1, no block is visible.
    visible = tl.minimum((position + BLOCK) // BLOCK, max_blocks)
    chosen = block_ids_ptr + (head * num_tokens + token).to(tl.int64) * TOPK
    slot = tl.arange(0, TOPK_PADDED)
    if (visible <= TOPK) | (not HAS_SCORES):
        tl.store(chosen + slot, tl.where(slot < visible, slot, -1), mask=slot < TOPK)
    else:
        token_scores = scores_ptr + (head.to(tl.int64) * head_stride + token.to(tl.int64) * token_stride) * UNIT
        # Forced blocks take no part. That does not spoil the groups: at most as many of the TOPK maxima are forced
        # blocks' own as blocks are forced, and so many fewer are wanted.
        put_best(
            token_scores, chosen, visible, INIT_BLOCKS, visible - LOCAL_BLOCKS, TOPK - INIT_BLOCKS - LOCAL_BLOCKS,
            TOPK, TOPK_PADDED, NUM_BLOCKS, NUM_STEPS, GROUPS, GROUP_RUN, UNROLL,
        )  # fmt: skip
        with_forced(chosen, visible, TOPK, TOPK_PADDED, INIT_BLOCKS, LOCAL_BLOCKS)


@jit
def with_forced(
    chosen, visible, TOPK: tl.constexpr, TOPK_PADDED: tl.constexpr, INIT_BLOCKS: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Put the forced blocks beside those that were stored at ``chosen``, and all in order."""
    slot = tl.arange(0, TOPK_PADDED)
    k = TOPK - INIT_BLOCKS - LOCAL_BLOCKS
    tl.debug_barrier()
    taken = tl.load(chosen + slot, mask=slot < k, other=0)
    forced = slot - k
    forced = tl.where(forced < INIT_BLOCKS, forced, visible - LOCAL_BLOCKS + forced - INIT_BLOCKS)
    taken = tl.where(slot < k, taken, forced)
    tl.debug_barrier()
    store_ascending(taken, chosen, TOPK, TOPK_PADDED)


@jit
def put_best(
    token_scores, chosen, visible, first_free, end_free, k, TOPK: tl.constexpr, TOPK_PADDED: tl.constexpr,
    NUM_BLOCKS: tl.constexpr, NUM_STEPS: tl.constexpr, GROUPS: tl.constexpr, GROUP_RUN: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """Store the ``k`` best of the free blocks at ``chosen``, in no order; it needs room for ``TOPK``.

    Args:
        visible: blocks that have a score; the free ones are those from ``first_free`` to ``end_free - 1``, and at most
            ``TOPK - k`` of the others.
    """
    if (NUM_STEPS == 0) | (visible <= NUM_BLOCKS):
        block = tl.arange(0, NUM_BLOCKS)
        score = tl.load(token_scores + block, mask=block < visible, other=float("-inf"))
        put_greatest(_free_keys(score, block, first_free, end_free), k, block, chosen)
    elif NUM_STEPS > 0:
        _two_rounds(
            token_scores, chosen, visible, first_free, end_free, k, TOPK, TOPK_PADDED, NUM_STEPS, GROUPS, GROUP_RUN,
            UNROLL,
        )  # fmt: skip


@jit
def _two_rounds(
    token_scores, chosen, visible, first_free, end_free, k, TOPK: tl.constexpr, TOPK_PADDED: tl.constexpr,
    NUM_STEPS: tl.constexpr, GROUPS: tl.constexpr, GROUP_RUN: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The best groups first, which are put where the best blocks will be; then the best of their blocks."""
    TILE: tl.constexpr = GROUPS * GROUP_RUN
    slot = tl.arange(0, TOPK_PADDED)
    lane = tl.arange(0, TILE)
    best = tl.full([TILE], float("-inf"), tl.float32)
    whole = visible // TILE * TILE
    for start in tl.range(0, whole, TILE, loop_unroll_factor=UNROLL):
        best = tl.maximum(best, tl.load(token_scores + start + lane))
    rest = tl.multiple_of((visible + 3) // 4 * 4, 4) - whole
    score = tl.load(token_scores + whole + lane, mask=lane < rest, other=float("-inf"))
    best = tl.maximum(best, tl.where(lane < visible - whole, score, float("-inf")))
    best = tl.max(tl.reshape(best, [GROUPS, GROUP_RUN]), axis=1)
    group = tl.arange(0, GROUPS)
    key = tl.where(group * GROUP_RUN < visible, ordered(best), LOWEST_KEY)
    put_greatest(key, tl.minimum(TOPK, tl.cdiv(visible, GROUP_RUN)), group, chosen)
    tl.debug_barrier()
    is_group = (slot < TOPK) & (slot < tl.cdiv(visible, GROUP_RUN))
    of_slot = tl.load(chosen + slot, mask=is_group, other=0)
    tl.debug_barrier()
    member = tl.arange(0, GROUP_RUN * NUM_STEPS)
    block = of_slot[:, None] * GROUP_RUN + (member // GROUP_RUN * TILE + member % GROUP_RUN)[None, :]
    block = tl.where(is_group[:, None], block, visible)
    block = tl.reshape(block, [TOPK_PADDED * GROUP_RUN * NUM_STEPS])
    of_member = tl.load(token_scores + block, mask=block < visible, other=float("-inf"))
    put_greatest(_free_keys(of_member, block, first_free, end_free), k, block, chosen)


@jit
def ordered(x):
    """int32 in the order of fp32; NaN above only the lowest, which stands for 'not there'."""
    bits = x.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(x == x, key, -0x7FFFFFFF)


@jit
def _free_keys(score, block, first_free, end_free):
    """Keys of the blocks that are not forced in; the lowest for others."""
    return tl.where((block >= first_free) & (block < end_free), ordered(score), LOWEST_KEY)


@jit
def put_greatest(key, k, value, out):
    """Store the values of the ``k`` greatest keys at ``out``, in no order; of equal keys the first.

    The k-th greatest key is found from the top, two bits at a time: the greatest two that k keys still reach. Bits that
    all keys share are known, and it is enough to go on until exactly k keys are as great, whatever the lower bits.
    """
    highest = tl.max(key)
    differ = highest ^ tl.min(tl.where(key == LOWEST_KEY, highest, key))
    bit = 31
    while (bit > 0) & (((differ >> bit) & 1) == 0):
        bit -= 1
    bit = bit // 2 * 2
    # With its first bit inverted, an int32 is in the order of its bits.
    known = (highest ^ LOWEST_KEY) & ~((4 << bit) - 1)
    count = k + 1
    while (bit >= 0) & (count != k):
        of_one, of_two, of_three = _count_as_great(key, known, bit)
        digit = (of_one >= k).to(tl.int32) + (of_two >= k).to(tl.int32) + (of_three >= k).to(tl.int32)
        count = tl.where(digit == 1, of_one, count)
        count = tl.where(digit == 2, of_two, count)
        count = tl.where(digit == 3, of_three, count)
        known |= digit << bit
        bit -= 2
    kth = known ^ LOWEST_KEY
    above = (key > kth).to(tl.int32)
    equal = (key == kth).to(tl.int32)
    ranks = tl.cumsum(above | (equal << 16))
    slot = tl.where(key > kth, ranks & 0xFFFF, tl.sum(above) + (ranks >> 16)) - 1
    tl.store(out + slot, value, mask=(key >= kth) & (slot < k))


@jit
def _count_as_great(key, known, bit):
    """How many keys reach ``known`` with 1, 2 and 3 in the two bits from ``bit`` on. All in one sum, if they fit."""
    one = (key >= ((known | (1 << bit)) ^ LOWEST_KEY)).to(tl.int32)
    two = (key >= ((known | (2 << bit)) ^ LOWEST_KEY)).to(tl.int32)
    three = (key >= ((known | (3 << bit)) ^ LOWEST_KEY)).to(tl.int32)
    if key.shape[0] < 1024:
        counts = tl.sum(one | (two << 10) | (three << 20))
        of_one, of_two, of_three = counts & 1023, (counts >> 10) & 1023, counts >> 20
    else:
        of_one, of_two, of_three = tl.sum(one), tl.sum(two), tl.sum(three)
    return of_one, of_two, of_three


@jit
def store_ascending(value, out, COUNT: tl.constexpr, PADDED: tl.constexpr):
    """Store ``COUNT`` different numbers in rising order; those after them in ``value`` are ignored."""
    i = tl.arange(0, PADDED)
    value = tl.where(i < COUNT, value, 0x7FFFFFFF)
    # value[None, :] is laid out along the other axis, so this compares every pair.
    rank = tl.sum((value[None, :] < value[:, None]).to(tl.int32), axis=1)
    tl.store(out + rank, value, mask=i < COUNT)
