"""The operations of MiniMax Sparse Attention on a paged cache, for any device.

The method is that of the MSA report, arXiv:2606.13392; :mod:`msa_backend.kernels.reference` is its definition in code.
Pages and sparse blocks are the same 128 tokens. What lies in the cache beyond a sequence's tokens never reaches a
result. All errors are raised from shapes and dtypes alone, without waiting for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, cpu
from .batch import Batch, Part, Step
from .caches import LayerCaches
from .dispatch import choose
from .norms import HeadNorms
from .selection import Selection
from .share import Share

__all__ = [
    "Batch", "HeadNorms", "LayerCaches", "Part", "Selection", "Step",
    "Share", "attend", "dense_attention", "merge_candidates", "norm_rope_write", "select_blocks", "select_candidates",
    "sparse_attention", "write",
]  # fmt: skip


def write(k: Tensor, v: Tensor, index_k: Tensor | None, caches: LayerCaches, slot_mapping: Tensor) -> None:
    """Write new tokens into their slots of the caches, in their dtypes; fp8 is divided by its scale and saturates.

    Args:
        k, v: ``[num_tokens, num_kv_heads, head_dim]`` fp16, bf16 or fp32.
        index_k: ``[num_tokens, index_dim]``, same dtypes; None for a dense layer.
        slot_mapping: ``[num_tokens]`` int64, ``page * 128 + offset`` of each token; a negative slot is skipped.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    checks.check_write(k, v, index_k, caches, slot_mapping)
    choose(k.device).module.write(k, v, index_k, caches, slot_mapping)


def norm_rope_write(
    projected: Tensor,
    positions: Tensor,
    norms: HeadNorms,
    caches: LayerCaches,
    slot_mapping: Tensor,
    *,
    index_q_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Make a sparse layer's queries, and write its keys and values, from its one fused projection.

    Queries, keys, index queries and the index key are RMS-normed head by head, Gemma style (weight + 1), and their
    first ``rotary_dim`` channels are rotated, half-split (NeoX), all in fp32 with one rounding at the end. Values are
    written as they are. Tokens of a negative slot are computed too, but written nowhere.

    Args:
        projected: ``[num_tokens, num_heads * head_dim + 2 * num_kv_heads * head_dim + (num_kv_heads + 1) * index_dim]``
            fp16, bf16 or fp32: queries, keys, values, index queries, index key. Its last axis is contiguous. The width
            says how many query heads there are; there are as many index query heads as KV heads.
        positions: ``[num_tokens]`` int64, contiguous; those outside of the rope table are taken for the nearest.
        slot_mapping: as in :func:`write`, contiguous.
        index_q_dtype: of the index queries, ``projected``'s if None. With ``torch.float8_e4m3fn`` each token and head
            is scaled so that its largest channel is 448, which leaves the order of its blocks as it was.

    Returns:
        ``[num_tokens, num_heads, head_dim]`` queries in ``projected``'s dtype, and
        ``[num_tokens, num_kv_heads, index_dim]`` index queries.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    checks.check_norm_rope_write(projected, positions, norms, caches, slot_mapping, index_q_dtype)
    return choose(projected.device).module.norm_rope_write(
        projected, positions, norms, caches, slot_mapping, index_q_dtype=index_q_dtype
    )


def select_blocks(index_q: Tensor, caches: LayerCaches, batch: Batch, selection: Selection) -> Tensor:
    """Choose the blocks each query token attends to, once for every index head.

    A block scores the largest ``index_q . index_k`` over its tokens that the query sees. The forced blocks are chosen
    whatever they score. Equal scores may be broken either way.

    Args:
        index_q: ``[num_tokens, num_index_heads, index_dim]`` fp16, bf16 or fp32; fp8 e4m3 if the keys are too. A factor
            of a token and head changes no choice, so fp8 queries may be scaled each by its own.
        batch: whose tokens these are; tokens past its last sequence are padding.

    Returns:
        ``[num_index_heads, num_tokens, topk]`` int32: block numbers within the sequence (position // 128), ascending,
        none twice, -1 after the last. All -1 for padding.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    checks.check_select_blocks(index_q, caches)
    return choose(index_q.device).module.select_blocks(index_q, caches, batch, selection)


def select_candidates(index_q: Tensor, caches: LayerCaches, batch: Batch, selection: Selection, share: Share) -> Tensor:
    """The part of :func:`select_blocks` that one of several ranks does for all, each for other blocks.

    Ranks that hold the same index keys score a share of the blocks each, for the index heads of all. With the
    candidates of all shares :func:`merge_candidates` chooses what :func:`select_blocks` would have.

    Args:
        index_q: as of :func:`select_blocks`, the index heads of all ranks.
        share: the blocks that are scored.

    Returns:
        ``[2, num_index_heads, num_tokens, topk]`` int32: the best blocks of the share by score, none of them forced, in
        no order. First keys, in the order of the scores, then block numbers; -1 for none.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    checks.check_select_blocks(index_q, caches)
    return choose(index_q.device).module.select_candidates(index_q, caches, batch, selection, share)


def merge_candidates(candidates: Tensor, batch: Batch, selection: Selection) -> Tensor:
    """Choose the blocks of some index heads from the candidates of all shares.

    Args:
        candidates: ``[ranks, 2, num_index_heads, num_tokens, topk]`` int32, what :func:`select_candidates` returned on
            each rank for these heads; the last two axes contiguous.

    Returns:
        As :func:`select_blocks`. Scores that are equal to the last bit may be taken either way.

    Raises:
        ValueError: another shape, dtype or number of blocks.
    """
    checks.check_candidates(candidates, selection)
    return choose(candidates.device).module.merge_candidates(candidates, batch, selection)


def sparse_attention(
    q: Tensor, caches: LayerCaches, block_ids: Tensor, batch: Batch, scale: float, out: Tensor | None = None
) -> Tensor:
    """Exact causal softmax attention of each group of query heads over its selected blocks alone.

    Query heads ``[i * group, (i + 1) * group)`` share KV head ``i`` and its selection.

    Args:
        q: ``[num_tokens, num_heads, head_dim]`` fp16, bf16 or fp32.
        block_ids: ``[num_kv_heads, num_tokens, topk]`` int32, as :func:`select_blocks` returns them.
        batch: whose tokens these are; tokens past its last sequence are padding.
        scale: of the logits, positive, usually ``head_dim ** -0.5``.
        out: where to write the result, if given: same shape and device as ``q``, any dtype, last axis contiguous.

    Returns:
        ``[num_tokens, num_heads, head_dim]``, ``out`` or a new tensor like ``q``; 0 for a token without blocks.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    checks.check_sparse_attention(q, caches, block_ids, scale, out)
    return choose(q.device).module.sparse_attention(q, caches, block_ids, batch, scale, out)


def attend(
    q: Tensor,
    index_q: Tensor,
    caches: LayerCaches,
    batch: Batch,
    selection: Selection,
    scale: float,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`select_blocks` and :func:`sparse_attention` in one, with what they hold in between shared by all layers.

    Raises:
        ValueError: as of the two.
    """
    checks.check_attend(q, index_q, caches, scale, out)
    return choose(q.device).module.attend(q, index_q, caches, batch, selection, scale, out)


def dense_attention(q: Tensor, caches: LayerCaches, batch: Batch, scale: float, out: Tensor | None = None) -> Tensor:
    """Exact causal softmax attention over the whole sequence, for the dense layers of an engine without its own.

    Shapes and errors are those of :func:`sparse_attention`. On a CPU only: on GPUs engines bring FlashAttention.

    Raises:
        ValueError: the device has no such operation.
    """
    checks.check_sparse_attention(q, caches, None, scale, out)
    if choose(q.device).is_triton:
        raise ValueError(f"dense_attention has no kernel for {q.device}; use the engine's own dense attention")
    return cpu.dense_attention(q, caches, batch, scale, out)
