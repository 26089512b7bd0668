"""Combine the partial outputs of each token's selected blocks by their log-sum-exps."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from ..launch import Launch, Options, kernel
from ..pages import units
from ..sizes import next_power_of_2
from ..softmax import LOWEST
from ..tiles import UNIT
from .invert import CURSORS, ELSEWHERE, Inverse


def combine(o_partial: Tensor, lse: Tensor, inverse: Inverse, out: Tensor, group: int) -> Launch:
    """The launch that writes ``out`` of the tokens that have a place, 0 for those whose places are all -1, no others.

    Args:
        o_partial: ``[max_entries * group_padded, dim]``, normalised.
        lse: ``[max_entries * group_padded]`` fp32, base 2.
        out: ``[num_tokens, num_kv_heads * group, dim]``.
    """
    num_kv_heads, num_tokens, topk = inverse.place.shape
    return msa_combine(
        (num_tokens, num_kv_heads),
        (o_partial, lse, inverse.place, inverse.cursors, out, *units("out", out.stride()[:2]), num_tokens),
        (group, next_power_of_2(group), o_partial.shape[1], topk, next_power_of_2(topk), CURSORS),
        Options(num_warps=4),
    )  # fmt: skip


@kernel()
def msa_combine(
    o_partial_ptr, lse_ptr, place_ptr, cursors_ptr, out_ptr, out_token_stride, out_head_stride, num_tokens,
    GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, DIM: tl.constexpr, TOPK: tl.constexpr, TOPK_PADDED: tl.constexpr,
    CURSORS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    if (token == 0) & (head == 0):
        tl.store(cursors_ptr + tl.arange(0, CURSORS), tl.zeros([CURSORS], tl.int32))
    in_group = tl.arange(0, GROUP_PADDED)
    channel = tl.arange(0, DIM)
    slot = tl.arange(0, TOPK_PADDED)
    places = place_ptr + (head * num_tokens + token) * TOPK
    entry = tl.load(places + slot, mask=slot < TOPK, other=ELSEWHERE).to(tl.int64)
    if tl.max(entry) == ELSEWHERE:
        return
    there = (entry >= 0)[:, None] & (in_group < GROUP)[None, :]
    lse = tl.load(lse_ptr + entry[:, None] * GROUP_PADDED + in_group[None, :], mask=there, other=float("-inf"))
    m_i = tl.maximum(tl.max(lse, axis=0), LOWEST)  # -inf for no block at all: the output is then 0
    l_i = tl.sum(tl.exp2(lse - m_i[None, :]), axis=0)
    acc = tl.zeros([GROUP_PADDED, DIM], dtype=tl.float32)
    for i in tl.static_range(TOPK):
        # Out of the registers: read again after the branch, it would be waited for again.
        of_slot = tl.sum(tl.where(slot == i, entry, 0))
        row = of_slot * GROUP_PADDED + in_group
        there = (in_group < GROUP) & (row >= 0)
        weight = tl.exp2(tl.load(lse_ptr + row, mask=there, other=float("-inf")) - m_i)
        o = tl.load(o_partial_ptr + row[:, None] * DIM + channel[None, :], mask=there[:, None], other=0.0)
        acc += weight[:, None] * o.to(tl.float32)
    acc = acc / tl.where(l_i > 0, l_i, 1.0)[:, None]
    out_ptrs = out_ptr + (token * out_token_stride + (head * GROUP + in_group) * out_head_stride)[:, None] * UNIT
    tl.store(out_ptrs + channel[None, :], acc.to(out_ptr.dtype.element_ty), mask=(in_group < GROUP)[:, None])
