"""The best-scoring blocks of each query token, without a sort.

One program chooses for one (index head, token). It streams the token's scores once, keeping the maxima of some hundred
groups of blocks: the k best blocks lie in the k groups with the greatest maxima, since every other block is no better
than the k-th of those, and each of the k groups holds one as good as it. So only the blocks of k groups are read again.
In both rounds the k-th greatest value is found bit by bit, by counting, which within a single warp is one instruction.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..batch import BLOCK_SIZE, Batch
from . import arch, pdl
from .pdl import let_next_start, wait_for_previous
from .rows import STEP_ARGUMENTS
from .sizes import ceil_div, next_power_of_2

SINGLE_ROUND_BLOCKS = 512
"""Up to so many blocks are compared directly, without groups."""
MANY_BLOCKS = 4096
GROUPS = 256
GROUPS_OF_MANY = 512
"""Groups above ``MANY_BLOCKS``: twice the maxima to compare, half the blocks to read again."""
GROUP_RUN = 4
"""Neighbouring blocks in a group, one 16-byte load; the rest of it lies at multiples of ``groups * GROUP_RUN``."""


def select_topk(
    scores: Tensor | None,
    batch: Batch,
    *,
    num_tokens: int,
    num_heads: int,
    topk: int,
    init_blocks: int,
    local_blocks: int,
) -> Tensor:
    """Choose ``topk`` blocks a token: those forced in, then those with the greatest scores.

    Args:
        scores: ``[num_heads, num_tokens, blocks]`` fp32 of any strides but 1 on the last axis, whose length is a
            multiple of 4. Only a token's visible blocks need be there. NaN ranks below all else. May be None if
            ``max_seq_len`` makes every visible block fit in ``topk``.

    Returns:
        ``[num_heads, num_tokens, topk]`` int32, as :func:`msa_backend.kernels.api.select_blocks`.
    """
    block_ids = torch.empty(num_heads, num_tokens, topk, dtype=torch.int32, device=batch.seq_lens.device)
    max_blocks = min(-(-batch.max_seq_len // BLOCK_SIZE), batch.block_table.shape[1])
    if block_ids.numel() == 0:
        return block_ids
    if max_blocks <= topk:
        scores = None
    elif scores is None:
        raise ValueError(f"{max_blocks} blocks may be visible, but top-k is {topk}; pass scores")
    stride_head, stride_token = (0, 0) if scores is None else scores.stride()[:2]
    aligned = (stride_head | stride_token) % 4 == 0 and (scores is None or scores.data_ptr() % 16 == 0)
    groups = GROUPS if max_blocks <= MANY_BLOCKS else GROUPS_OF_MANY
    num_steps = 0
    if max_blocks > SINGLE_ROUND_BLOCKS:
        num_steps = next_power_of_2(ceil_div(max_blocks, groups * GROUP_RUN))
    dependent = pdl.available(block_ids.device)
    # Few programs on an idle chip are waited for one by one: more warps each, to stream a long row.
    few = max_blocks > MANY_BLOCKS and num_tokens * num_heads <= arch.num_sms(block_ids.device)
    _select_topk[(num_tokens, num_heads)](
        scores if scores is not None else block_ids,
        block_ids,
        batch.cu_seqlens_q,
        batch.seq_lens,
        batch.context_lens,
        batch.num_seqs,
        num_tokens,
        max_blocks,
        stride_head,
        stride_token,
        ALIGN=4 if aligned else 1,
        TOPK=topk,
        TOPK_PADDED=next_power_of_2(topk),
        INIT_BLOCKS=init_blocks,
        LOCAL_BLOCKS=local_blocks,
        HAS_SCORES=scores is not None,
        NUM_BLOCKS=max(32, next_power_of_2(max_blocks)) if num_steps == 0 else 0,
        NUM_STEPS=num_steps,
        GROUPS=groups,
        GROUP_RUN=GROUP_RUN,
        UNROLL=4 if few else 1,
        PDL=dependent,
        launch_pdl=dependent,
        num_warps=4 if few else 1,
    )
    return block_ids


@triton.jit(do_not_specialize=STEP_ARGUMENTS)
def _select_topk(
    scores,
    block_ids,
    cu_seqlens_q,
    seq_lens,
    context_lens,
    num_seqs,
    num_tokens,
    max_blocks,
    stride_head,
    stride_token,
    ALIGN: tl.constexpr,
    TOPK: tl.constexpr,
    TOPK_PADDED: tl.constexpr,
    INIT_BLOCKS: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    NUM_STEPS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_RUN: tl.constexpr,
    UNROLL: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    let_next_start(PDL)
    token = tl.program_id(0)
    head = tl.program_id(1)
    row = row_of_token(cu_seqlens_q, num_seqs, token)
    visible = 0
    if row < num_seqs:
        position = tl.load(context_lens + row) + token - tl.load(cu_seqlens_q + row)
        visible = visible_blocks(position, tl.load(seq_lens + row), max_blocks)
    chosen = block_ids + (head * num_tokens + token).to(tl.int64) * TOPK
    slot = tl.arange(0, TOPK_PADDED)
    if (visible <= TOPK) | (not HAS_SCORES):
        tl.store(chosen + slot, tl.where(slot < visible, slot, -1), mask=slot < TOPK)
    else:
        first = head.to(tl.int64) * stride_head + token.to(tl.int64) * stride_token
        token_scores = scores + tl.multiple_of(first, ALIGN)
        # Forced blocks take no part. That does not spoil the groups: at most as many of the TOPK maxima are forced
        # blocks' own as blocks are forced, and so many fewer are wanted.
        k = TOPK - INIT_BLOCKS - LOCAL_BLOCKS
        if NUM_STEPS == 0:
            block = tl.arange(0, NUM_BLOCKS)
            score = tl.load(token_scores + block, mask=block < visible, other=float("-inf"))
            put_greatest(free_keys(score, block, visible, INIT_BLOCKS, LOCAL_BLOCKS), k, block, chosen)
        else:
            TILE: tl.constexpr = GROUPS * GROUP_RUN
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
            key = tl.where(group * GROUP_RUN < visible, ordered(best), -0x80000000)
            put_greatest(key, tl.minimum(TOPK, tl.cdiv(visible, GROUP_RUN)), group, chosen)
            tl.debug_barrier()
            is_group = (slot < TOPK) & (slot < tl.cdiv(visible, GROUP_RUN))
            group = tl.load(chosen + slot, mask=is_group, other=0)
            tl.debug_barrier()
            member = tl.arange(0, GROUP_RUN * NUM_STEPS)
            block = group[:, None] * GROUP_RUN + (member // GROUP_RUN * TILE + member % GROUP_RUN)[None, :]
            block = tl.where(is_group[:, None], block, visible)
            block = tl.reshape(block, [TOPK_PADDED * GROUP_RUN * NUM_STEPS])
            score = tl.load(token_scores + block, mask=block < visible, other=float("-inf"))
            put_greatest(free_keys(score, block, visible, INIT_BLOCKS, LOCAL_BLOCKS), k, block, chosen)
        tl.debug_barrier()
        taken = tl.load(chosen + slot, mask=slot < k, other=0)
        forced = slot - k
        forced = tl.where(forced < INIT_BLOCKS, forced, visible - LOCAL_BLOCKS + forced - INIT_BLOCKS)
        taken = tl.where(slot < k, taken, forced)
        tl.debug_barrier()
        store_ascending(taken, chosen, TOPK, TOPK_PADDED)


@triton.jit
def row_of_token(cu_seqlens_q, num_seqs, token):
    """The row that owns ``token``: as many as end at or before it. ``num_seqs`` for padding after the last row."""
    row = 0
    for start in range(0, num_seqs, 128):
        i = start + tl.arange(0, 128)
        end = tl.load(cu_seqlens_q + 1 + i, mask=i < num_seqs, other=0x7FFFFFFF)
        row += tl.sum((end <= token).to(tl.int32))
    return row


@triton.jit
def visible_blocks(position, seq_len, max_blocks):
    """Blocks that the query at ``position`` sees; none in a padding row, whose length is 0."""
    tokens = tl.maximum(tl.minimum(position + 1, seq_len), 0)
    return tl.minimum((tokens + 127) // 128, max_blocks)


@triton.jit
def ordered(x):
    """int32 in the order of fp32; NaN above only the lowest, which stands for 'not there'."""
    bits = x.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(x == x, key, -0x7FFFFFFF)


@triton.jit
def free_keys(score, block, visible, INIT_BLOCKS: tl.constexpr, LOCAL_BLOCKS: tl.constexpr):
    """Keys of the visible blocks that are not forced in; the lowest for others."""
    free = (block >= INIT_BLOCKS) & (block < visible - LOCAL_BLOCKS)
    return tl.where(free, ordered(score), -0x80000000)


@triton.jit
def put_greatest(key, k, value, out):
    """Store the values of the ``k`` greatest keys at ``out``, in no order; of equal keys the first.

    The bits of the k-th greatest key are found from the top: a bit is set if k keys are still as great. Those that all
    keys share are known, and it is enough to go on until exactly k keys are as great, whatever the lower bits.
    """
    highest = tl.max(key)
    differ = highest ^ tl.min(tl.where(key == -0x80000000, highest, key))
    bit = 31
    while (bit >= 0) & (((differ >> bit) & 1) == 0):
        bit -= 1
    # With its first bit inverted, an int32 is in the order of its bits.
    kth = ((highest ^ -0x80000000) & ~((2 << bit) - 1)) ^ -0x80000000
    count = k + 1
    while (bit >= 0) & (count != k):
        trial = kth ^ (1 << bit)
        as_great = tl.sum((key >= trial).to(tl.int32))
        kth = tl.where(as_great >= k, trial, kth)
        count = tl.where(as_great >= k, as_great, count)
        bit -= 1
    above = (key > kth).to(tl.int32)
    equal = (key == kth).to(tl.int32)
    ranks = tl.cumsum(above | (equal << 16))
    slot = tl.where(key > kth, ranks & 0xFFFF, tl.sum(above) + (ranks >> 16)) - 1
    tl.store(out + slot, value, mask=(key >= kth) & (slot < k))


@triton.jit
def store_ascending(value, out, COUNT: tl.constexpr, PADDED: tl.constexpr):
    """Store ``COUNT`` different numbers in rising order; those after them in ``value`` are ignored."""
    i = tl.arange(0, PADDED)
    value = tl.where(i < COUNT, value, 0x7FFFFFFF)
    # value[None, :] is laid out along the other axis, so this compares every pair.
    rank = tl.sum((value[None, :] < value[:, None]).to(tl.int32), axis=1)
    tl.store(out + rank, value, mask=i < COUNT)
