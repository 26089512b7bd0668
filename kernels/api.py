"""The operations of MiniMax Sparse Attention on a paged cache, for any device.

The method is that of the MSA report, arXiv:2606.13392; :mod:`msa_backend.kernels.reference` is its definition in code.
Pages and sparse blocks are the same 128 tokens. Cache tensors may be views with any strides, the last axis alone must
be contiguous. What lies in the cache beyond a sequence's tokens never reaches a result.

All errors are raised from shapes and dtypes alone, without waiting for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .batch import Batch
from .dispatch import choose


def write_cache(
    k: Tensor,
    v: Tensor,
    index_k: Tensor | None,
    k_pages: Tensor,
    v_pages: Tensor,
    index_k_pages: Tensor | None,
    slot_mapping: Tensor,
    *,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """Write new tokens into their slots of the cache, in its dtype.

    Args:
        k, v: ``[num_tokens, num_kv_heads, head_dim]`` fp16, bf16 or fp32.
        index_k: ``[num_tokens, index_dim]`` fp16, bf16 or fp32; None for a dense layer.
        k_pages, v_pages: ``[num_pages, num_kv_heads, 128, head_dim]`` fp16, bf16, fp32 or fp8.
        index_k_pages: ``[num_pages, 128, index_dim]``, same dtypes; None for a dense layer.
        slot_mapping: ``[num_tokens]`` int64, ``page * 128 + offset`` of each token; a negative slot is skipped.
        k_scale, v_scale: with fp8 pages, what keys and values are divided by; values too large saturate.

    Raises:
        ValueError: shapes, dtypes or scales that do not fit together.
    """
    checks.check_write_cache(k, v, index_k, k_pages, v_pages, index_k_pages, slot_mapping, k_scale, v_scale)
    choose(k.device).module.write_cache(
        k, v, index_k, k_pages, v_pages, index_k_pages, slot_mapping, k_scale=k_scale, v_scale=v_scale
    )


def norm_rope_write(
    projected: Tensor,
    positions: Tensor,
    cos_sin_cache: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    index_q_weight: Tensor,
    index_k_weight: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    index_k_pages: Tensor,
    slot_mapping: Tensor,
    *,
    num_heads: int,
    eps: float,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    index_q_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Make a sparse layer's queries, and write its keys and values, from its one fused projection.

    Queries, keys, index queries and the index key are RMS-normed head by head, Gemma style (weight + 1), and their
    first ``rotary_dim`` channels are rotated, half-split (NeoX), all in fp32 with one rounding at the end. Values are
    written as they are. Tokens of a negative slot are computed too, but written nowhere.

    Args:
        projected: ``[num_tokens, num_heads * head_dim + 2 * num_kv_heads * head_dim + (num_kv_heads + 1) * index_dim]``
            fp16, bf16 or fp32: queries, keys, values, index queries, index key. Its last axis is contiguous.
        positions: ``[num_tokens]`` int64, contiguous; those outside of ``cos_sin_cache`` are taken for the nearest.
        cos_sin_cache: ``[max_positions, rotary_dim]``, any float dtype: cosines, then sines, as vLLM keeps them.
        q_weight, k_weight: ``[head_dim]``, contiguous, the norms' weights, less 1 as the checkpoint has them.
        index_q_weight, index_k_weight: ``[index_dim]``, likewise.
        k_pages, v_pages, index_k_pages, slot_mapping, k_scale, v_scale: as in :func:`write_cache`.
        num_heads: query heads. There are as many index query heads as KV heads.
        eps: of the norms.
        index_q_dtype: of the index queries, ``projected``'s if None. With ``torch.float8_e4m3fn`` each token and head
            is scaled so that its largest channel is 448, which leaves the order of its blocks as it was.

    Returns:
        ``[num_tokens, num_heads, head_dim]`` queries in ``projected``'s dtype, and
        ``[num_tokens, num_kv_heads, index_dim]`` index queries.

    Raises:
        ValueError: shapes, dtypes or scales that do not fit together.
    """
    checks.check_norm_rope_write(
        projected, positions, cos_sin_cache, q_weight, k_weight, index_q_weight, index_k_weight,
        k_pages, v_pages, index_k_pages, slot_mapping, num_heads, k_scale, v_scale, index_q_dtype,
    )  # fmt: skip
    return choose(projected.device).module.norm_rope_write(
        projected, positions, cos_sin_cache, q_weight, k_weight, index_q_weight, index_k_weight,
        k_pages, v_pages, index_k_pages, slot_mapping,
        num_heads=num_heads, eps=eps, k_scale=k_scale, v_scale=v_scale, index_q_dtype=index_q_dtype,
    )  # fmt: skip


def select_blocks(
    index_q: Tensor,
    index_k_pages: Tensor,
    batch: Batch,
    *,
    topk: int,
    init_blocks: int = 0,
    local_blocks: int = 1,
) -> Tensor:
    """Choose the blocks each query token attends to, once for every index head.

    A block scores the largest ``index_q . index_k`` over its tokens that the query sees. The ``init_blocks`` first and
    ``local_blocks`` newest visible blocks, the query's own counted, are chosen whatever they score and count within
    ``topk``. Equal scores may be broken either way.

    Args:
        index_q: ``[num_tokens, num_index_heads, index_dim]`` fp16, bf16 or fp32; fp8 e4m3 if the keys are too. A factor
            of a token and head changes no choice, so fp8 queries may be scaled each by its own.
        index_k_pages: ``[num_pages, 128, index_dim]`` fp16, bf16, fp32 or fp8 (of scale 1).
        batch: whose tokens these are; tokens past its last row are padding.

    Returns:
        ``[num_index_heads, num_tokens, topk]`` int32: block numbers within the sequence (position // 128), ascending,
        none twice, -1 after the last. All -1 for padding.

    Raises:
        ValueError: shapes or dtypes that do not fit together, or ``topk`` less than the blocks that are forced in.
    """
    checks.check_select_blocks(index_q, index_k_pages, topk, init_blocks, local_blocks)
    return choose(index_q.device).module.select_blocks(
        index_q, index_k_pages, batch, topk=topk, init_blocks=init_blocks, local_blocks=local_blocks
    )


def sparse_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_ids: Tensor,
    batch: Batch,
    *,
    scale: float,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """Exact causal softmax attention of each group of query heads over its selected blocks alone.

    Query heads ``[i * group, (i + 1) * group)`` share KV head ``i`` and its selection.

    Args:
        q: ``[num_tokens, num_heads, head_dim]`` fp16, bf16 or fp32.
        k_pages, v_pages: ``[num_pages, num_kv_heads, 128, head_dim]`` fp16, bf16, fp32 or fp8.
        block_ids: ``[num_kv_heads, num_tokens, topk]`` int32, as :func:`select_blocks` returns them.
        batch: whose tokens these are; tokens past its last row are padding.
        scale: of the logits, positive, usually ``head_dim ** -0.5``.
        k_scale, v_scale: with fp8 pages, what keys and values are multiplied by.
        out: where to write the result, if given: same shape and device as ``q``, any dtype.

    Returns:
        ``[num_tokens, num_heads, head_dim]``, ``out`` or a new tensor like ``q``; 0 for a token without blocks.

    Raises:
        ValueError: shapes, dtypes or scales that do not fit together.
    """
    checks.check_sparse_attention(q, k_pages, v_pages, block_ids, scale, k_scale, v_scale, out)
    return choose(q.device).module.sparse_attention(
        q, k_pages, v_pages, block_ids, batch, scale=scale, k_scale=k_scale, v_scale=v_scale, out=out
    )
