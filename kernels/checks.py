"""What the operations accept, from shapes and dtypes alone: caches, norms and selections have checked themselves.

Every message names the value, what is allowed, and what to do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .caches import COMPUTE_DTYPES, LayerCaches
from .norms import HeadNorms
from .selection import Selection

E4M3 = torch.float8_e4m3fn


def check_write(k: Tensor, v: Tensor, index_k: Tensor | None, caches: LayerCaches, slot_mapping: Tensor) -> None:
    num_tokens = slot_mapping.shape[0]
    for name, x in (("k", k), ("v", v)):
        _check_dtype(name, x)
        _check_shape(name, x, (num_tokens, caches.num_kv_heads, caches.head_dim), "one vector a slot and KV head")
    _check_int64("slot_mapping", slot_mapping)
    if (index_k is None) != (caches.index_k_pages is None):
        has, lacks = ("the caches", "index_k is None") if index_k is None else ("index_k", "the caches have none")
        raise ValueError(f"{has} has index keys but {lacks}; a sparse layer has both, a dense layer neither")
    if index_k is not None:
        _check_dtype("index_k", index_k)
        _check_shape("index_k", index_k, (num_tokens, caches.index_dim), "one vector a slot")


def check_norm_rope_write(
    projected: Tensor,
    positions: Tensor,
    norms: HeadNorms,
    caches: LayerCaches,
    slot_mapping: Tensor,
    index_q_dtype: torch.dtype | None,
) -> None:
    _check_dtype("projected", projected)
    if (norms.head_dim, norms.index_dim) != (caches.head_dim, caches.index_dim):
        raise ValueError(
            f"the norms are of {norms.head_dim} and {norms.index_dim} channels, but the caches keep heads of "
            f"{caches.head_dim} and index keys of {caches.index_dim}; pass those of one sparse layer"
        )
    num_tokens = slot_mapping.shape[0]
    if projected.dim() != 2 or projected.shape[0] != num_tokens or query_heads(projected, caches) < 1:
        raise ValueError(
            f"projected has shape {tuple(projected.shape)}, but must be ({num_tokens}, width) with room for a multiple "
            f"of {caches.num_kv_heads} query heads, {caches.num_kv_heads} key, value and index query heads and one "
            "index key for each slot; pass the whole projection"
        )
    _check_int64("slot_mapping", slot_mapping)
    _check_int64("positions", positions)
    _check_shape("positions", positions, (num_tokens,), "one a slot")
    if index_q_dtype not in (None, projected.dtype, E4M3):
        raise ValueError(
            f"index_q_dtype is {index_q_dtype}, but must be torch.float8_e4m3fn or {projected.dtype} like projected; "
            "leave it out"
        )
    for name, x in (("projected", projected), ("positions", positions), ("slot_mapping", slot_mapping)):
        if x.stride(-1) != 1:
            raise ValueError(f"{name} has stride {x.stride(-1)} on its last axis, but must have 1; make it contiguous")


def query_heads(projected: Tensor, caches: LayerCaches) -> int:
    """How many query heads a fused projection holds; 0 if its width fits no number."""
    others = 2 * caches.num_kv_heads * caches.head_dim + (caches.num_kv_heads + 1) * caches.index_dim
    heads, rest = divmod(projected.shape[1] - others, caches.head_dim)
    return 0 if rest or heads < 1 or heads % caches.num_kv_heads else heads


def check_select_blocks(index_q: Tensor, caches: LayerCaches) -> None:
    index_k_pages = caches.index_k_pages
    if index_k_pages is None:
        raise ValueError("the caches have no index keys, but blocks are selected by them; pass those of a sparse layer")
    if index_q.dtype != E4M3 or index_k_pages.dtype != E4M3:  # fp8 products take both
        _check_dtype("index_q", index_q)
    if index_q.dim() != 3 or index_q.shape[2] != caches.index_dim:
        raise ValueError(
            f"index_q has shape {tuple(index_q.shape)}, but must be (num_tokens, num_index_heads, {caches.index_dim}) "
            "to match the index keys in the cache; reshape it"
        )


def check_candidates(candidates: Tensor, selection: Selection) -> None:
    shape = tuple(candidates.shape)
    if len(shape) != 5 or shape[1] != 2 or shape[4] != selection.topk or candidates.dtype != torch.int32:
        raise ValueError(
            f"candidates are {candidates.dtype} of shape {shape}, but must be torch.int32 of shape (ranks, 2, "
            f"num_index_heads, num_tokens, {selection.topk}); pass what select_candidates returned on all ranks"
        )
    if candidates.stride()[3:] != (selection.topk, 1):
        raise ValueError(
            f"candidates have strides {candidates.stride()[3:]} on their last axes, but must have "
            f"({selection.topk}, 1); make them contiguous"
        )


def check_sparse_attention(
    q: Tensor, caches: LayerCaches, block_ids: Tensor | None, scale: float, out: Tensor | None
) -> None:
    """``block_ids`` None: they will be selected, one row for each KV head."""
    if not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}, but must be positive and finite; pass head_dim ** -0.5")
    _check_dtype("q", q)
    if q.dim() != 3 or q.shape[2] != caches.head_dim:
        raise ValueError(
            f"q has shape {tuple(q.shape)}, but must be (num_tokens, num_heads, {caches.head_dim}) to match the keys "
            "in the cache; reshape it"
        )
    num_tokens, num_heads, _ = q.shape
    if num_heads % caches.num_kv_heads:
        raise ValueError(
            f"q has {num_heads} heads, but the cache has {caches.num_kv_heads} KV heads and each must serve equally "
            "many; pass a multiple"
        )
    if out is not None and (out.shape != q.shape or out.stride(-1) != 1):
        raise ValueError(
            f"out has shape {tuple(out.shape)} and stride {out.stride(-1)} on its last axis, but must be "
            f"{tuple(q.shape)} like q and have 1; allocate it like q"
        )
    if block_ids is None:
        return
    if block_ids.dim() != 3 or block_ids.shape[2] == 0 or block_ids.dtype != torch.int32:
        raise ValueError(
            f"block_ids is {block_ids.dtype} of shape {tuple(block_ids.shape)}, but must be torch.int32 of shape "
            "(num_kv_heads, num_tokens, topk); pass what select_blocks returns"
        )
    _check_index_heads(block_ids.shape[0], caches)
    if block_ids.shape[1] != num_tokens:
        raise ValueError(
            f"block_ids are of {block_ids.shape[1]} tokens, but q has {num_tokens}; pass both with the same padding"
        )


def check_attend(q: Tensor, index_q: Tensor, caches: LayerCaches, scale: float, out: Tensor | None) -> None:
    check_sparse_attention(q, caches, None, scale, out)
    check_select_blocks(index_q, caches)
    _check_index_heads(index_q.shape[1], caches)
    if index_q.shape[0] != q.shape[0]:
        raise ValueError(
            f"index_q has {index_q.shape[0]} tokens, but q has {q.shape[0]}; pass both with the same padding"
        )


def _check_index_heads(num_index_heads: int, caches: LayerCaches) -> None:
    if num_index_heads != caches.num_kv_heads:
        raise ValueError(
            f"block_ids come from {num_index_heads} index heads, but the cache has {caches.num_kv_heads} KV heads and "
            "blocks are selected once for each; pass as many index heads to select_blocks"
        )


def _check_dtype(name: str, x: Tensor) -> None:
    if x.dtype not in COMPUTE_DTYPES:
        raise ValueError(f"{name} is {x.dtype}, but must be one of {', '.join(map(str, COMPUTE_DTYPES))}; convert it")


def _check_int64(name: str, x: Tensor) -> None:
    if x.dtype != torch.int64:
        raise ValueError(f"{name} is {x.dtype}, but must be torch.int64; convert it")


def _check_shape(name: str, x: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, but must be {shape}, {meaning}; slice or reshape it")
