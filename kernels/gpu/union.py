"""What a tile of neighbouring query tokens selected together."""

from __future__ import annotations

import triton.language as tl
from triton import jit


@jit
def blocks_of_tile(
    ids_ptr, ids_token_stride, count, TOKENS: tl.constexpr, TOPK: tl.constexpr, TOPK_PADDED: tl.constexpr
):
    """The choices of ``count`` tokens, flat: ``TOPK_PADDED`` entries for each of ``TOKENS``.

    Args:
        ids_ptr: the first token's block numbers; -1 for none.

    Returns:
        The block of each entry, or -1; a bit for each token that selected it; and whether the entry is its first.
    """
    entry = tl.arange(0, TOKENS * TOPK_PADDED)
    owner = entry // TOPK_PADDED
    slot = entry % TOPK_PADDED
    block = tl.load(ids_ptr + owner * ids_token_stride + slot, mask=(owner < count) & (slot < TOPK), other=-1)
    chosen_by = entry * 0
    other_slot = tl.arange(0, TOPK_PADDED)
    for other in range(count):
        of_other = tl.load(ids_ptr + other * ids_token_stride + other_slot, mask=other_slot < TOPK, other=-2)
        chosen_by |= tl.max((block[:, None] == of_other[None, :]).to(tl.int32), axis=1) << other
    is_first = (block >= 0) & ((chosen_by & ((1 << owner) - 1)) == 0)
    return block, chosen_by, is_first
