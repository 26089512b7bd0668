"""Attention, KV outer: load a block's K and V once and stream the queries that selected it past them.

For the tokens of long prompts that stand far into their sequence. Each (token, selected block) leaves a normalised
partial output and its log-sum-exp, in the order of the lists, so that a tile's partial outputs are one contiguous
stretch. A second kernel combines those of a token.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton import jit

from ...batch import BLOCK_SIZE, Batch
from ...caches import LayerCaches
from .. import arch, tma
from ..fp8 import widen
from ..launch import Launch, Options, kernel
from ..pages import Pages, units
from ..plan import Plan
from ..sizes import next_power_of_2
from ..tiles import UNIT, head_offsets, load_tile, load_tile_masked
from ..workspace import workspace_of
from .combine import combine
from .invert import TOKEN_BITS, TOKEN_MASK, invert

BLOCK_M = 64
"""Rows of a tile: tokens times query heads of the group. With 64 and four warps two programs fit on an SM, and one
loads or takes exponentials while the other multiplies."""
OPTIONS = Options(num_warps=4, num_stages=1)
MIN_ITEM_TOKENS = 16
MAX_ITEM_TOKENS = 64
"""Most tokens that one program streams past its block, in a short and in a long step."""
ITEMS_PER_SM = 16
"""Work items that should be left for each SM: with fewer, some SMs are done long before the others."""


def attend_kv_outer(
    q: Tensor,
    caches: LayerCaches,
    block_ids: Tensor,
    batch: Batch,
    plan: Plan,
    scale: float,
    out: Tensor,
    most_blocks: int,
    taken: Tensor,
) -> list[Launch]:
    """The launches that write ``out`` of the tokens of tiles that select many blocks; ``taken`` says which do not.

    Shapes are those of :func:`msa_backend.kernels.api.sparse_attention`; ``most_blocks`` and ``taken`` are those of
    :func:`.invert.invert`.
    """
    num_tokens, num_heads, dim = q.shape
    pages = caches.keep(Pages)
    group = num_heads // pages.num_kv_heads
    group_padded = next_power_of_2(group)
    tile_tokens = max(1, BLOCK_M // group_padded)
    fair_share = block_ids.numel() // (ITEMS_PER_SM * arch.num_sms(q.device))
    item_tokens = MAX_ITEM_TOKENS
    while item_tokens > max(MIN_ITEM_TOKENS, fair_share):
        item_tokens //= 2
    item_tokens = max(item_tokens, tile_tokens)
    inverse, launches = invert(
        block_ids, batch, plan, num_pages=pages.num_pages, item_tokens=item_tokens, tile_tokens=tile_tokens,
        most_blocks=most_blocks, taken=taken,
    )  # fmt: skip
    rows = inverse.entries.shape[0] * group_padded
    workspace = workspace_of(batch)
    o_partial = workspace.hold("o_partial", rows * dim, q.dtype).view(rows, dim)
    lse = workspace.hold("lse", rows, torch.float32)
    descriptors = [pages.k_desc, pages.v_desc]
    stored = tma.descriptor(o_partial, [tile_tokens * group_padded, dim])
    for partly in (False, True):
        bulk = not partly and None not in descriptors
        launch = msa_kv_outer(
            (inverse.items.shape[1],),
            (
                q, pages.k, pages.v, *(descriptors if bulk else (pages.k, pages.v)),
                o_partial, o_partial if stored is None else stored, lse, inverse.entries, inverse.items[int(partly)],
                inverse.cursors[1 + int(partly) :], pages.num_pages, pages.logit_scale(scale), pages.v_scale,
                *units("q", q.stride()[:2]), *pages.kv_strides,
            ),
            (
                group, group_padded, dim, BLOCK_SIZE, tile_tokens, item_tokens, partly, bulk, stored is not None,
            ),
            OPTIONS,
        )  # fmt: skip
        launches.append(launch)
    return [*launches, combine(o_partial, lse, inverse, out, group)]


@kernel(unaligned=("items_ptr", "num_items_ptr"))
def msa_kv_outer(
    q_ptr, k_ptr, v_ptr, k_desc, v_desc, o_partial_ptr, o_partial_desc, lse_ptr, entries_ptr, items_ptr, num_items_ptr,
    num_pages, logit_scale, v_scale, q_token_stride, q_head_stride, k_page_stride, k_head_stride, k_token_stride,
    v_page_stride, v_head_stride, v_token_stride,
    GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
    ITEM_TOKENS: tl.constexpr, PARTLY: tl.constexpr, LOAD_TMA: tl.constexpr, STORE_TMA: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    if item >= tl.load(num_items_ptr):
        return
    key = tl.load(items_ptr + item * 3)
    start = tl.load(items_ptr + item * 3 + 1)
    count = tl.load(items_ptr + item * 3 + 2)
    head = key // num_pages
    page = key % num_pages

    offs_m = tl.arange(0, TOKENS * GROUP_PADDED)
    in_tile = offs_m // GROUP_PADDED
    in_group = offs_m % GROUP_PADDED
    channel = tl.arange(0, DIM)
    offs_n = tl.arange(0, BLOCK)
    q_ptrs = q_ptr + (head * GROUP + in_group[:, None]) * q_head_stride * UNIT + channel[None, :]
    # The first queries set out before the block does: waiting for both at once is shorter.
    entry = start + in_tile
    real = (in_group < GROUP)[:, None]
    packed = tl.load(entries_ptr + entry, mask=in_tile < count, other=0)
    q = _load_q(q_ptrs, packed, q_token_stride, real)
    next_packed = tl.load(entries_ptr + entry + TOKENS, mask=in_tile + TOKENS < count, other=0)
    if LOAD_TMA:
        k = widen(k_desc.load([page, head, 0, 0]).reshape(BLOCK, DIM), q.dtype)
        v = widen(v_desc.load([page, head, 0, 0]).reshape(BLOCK, DIM), q.dtype)
    else:
        k_offsets = head_offsets(head, k_head_stride, k_token_stride, BLOCK, DIM)
        v_offsets = head_offsets(head, v_head_stride, v_token_stride, BLOCK, DIM)
        if PARTLY:
            # Beyond what any query of the item sees lies garbage; 0 * NaN would reach the sum.
            of_item = tl.arange(0, ITEM_TOKENS)
            used = (tl.load(entries_ptr + start + of_item, mask=of_item < count, other=0) >> TOKEN_BITS) + 1
            valid = offs_n < tl.max(tl.where(of_item < count, used, 0))
            k = load_tile_masked(k_ptr, page, k_page_stride, 0, k_token_stride, k_offsets, valid, q.dtype)
            v = load_tile_masked(v_ptr, page, v_page_stride, 0, v_token_stride, v_offsets, valid, q.dtype)
        else:
            k = load_tile(k_ptr, page, k_page_stride, 0, k_token_stride, k_offsets, q.dtype)
            v = load_tile(v_ptr, page, v_page_stride, 0, v_token_stride, v_offsets, q.dtype)
    for i in range(0, count, TOKENS):
        # The next tile of queries is on its way while this one is worked on, and the next one's tokens before it.
        next_q = _load_q(q_ptrs, next_packed, q_token_stride, real)
        after_next = tl.load(entries_ptr + entry + 2 * TOKENS, mask=i + 2 * TOKENS + in_tile < count, other=0)
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
        if PARTLY:
            products = tl.where(offs_n[None, :] <= (packed >> TOKEN_BITS)[:, None], products, float("-inf"))
        # One block is all there is: a softmax, but not an online one.
        m_i = tl.max(products, axis=1) * logit_scale
        weights = tl.exp2(products * logit_scale - m_i[:, None])
        l_i = tl.sum(weights, axis=1)
        o = (tl.dot(weights.to(v.dtype), v, input_precision="ieee") * (v_scale / l_i)[:, None]).to(q.dtype)
        row = entry.to(tl.int64) * GROUP_PADDED + in_group
        tl.store(lse_ptr + row, m_i + tl.log2(l_i))
        if STORE_TMA:
            o_partial_desc.store([(start + i) * GROUP_PADDED, 0], o)
        else:
            tl.store(o_partial_ptr + row[:, None] * DIM + channel[None, :], o)
        q = next_q
        packed = next_packed
        next_packed = after_next
        entry += TOKENS


@jit
def _load_q(q_ptrs, packed, q_token_stride, mask):
    token = (packed & TOKEN_MASK).to(tl.int64)
    return tl.load(q_ptrs + token[:, None] * q_token_stride * UNIT, mask=mask, other=0.0)
