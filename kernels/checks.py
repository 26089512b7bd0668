"""What the operations accept. Every message names the value, what is allowed, and what to do."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .batch import BLOCK_SIZE

COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


def check_write_cache(
    k: Tensor,
    v: Tensor,
    index_k: Tensor | None,
    k_pages: Tensor,
    v_pages: Tensor,
    index_k_pages: Tensor | None,
    slot_mapping: Tensor,
    k_scale: float,
    v_scale: float,
) -> None:
    _check_kv_pages(k_pages, v_pages, k_scale, v_scale)
    _, num_kv_heads, _, head_dim = k_pages.shape
    num_tokens = slot_mapping.shape[0]
    for name, x in (("k", k), ("v", v)):
        _check_dtype(name, x, COMPUTE_DTYPES)
        _check_shape(name, x, (num_tokens, num_kv_heads, head_dim), "one vector a slot and KV head of the cache")
    _check_int64("slot_mapping", slot_mapping)
    if (index_k is None) != (index_k_pages is None):
        given, missing = ("index_k_pages", "index_k") if index_k is None else ("index_k", "index_k_pages")
        raise ValueError(f"{given} is given but {missing} is None; give both for a sparse layer, neither for a dense")
    if index_k is not None and index_k_pages is not None:
        _check_index_pages(index_k_pages)
        _check_dtype("index_k", index_k, COMPUTE_DTYPES)
        _check_shape("index_k", index_k, (num_tokens, index_k_pages.shape[2]), "one vector a slot")


def check_norm_rope_write(
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
    num_heads: int,
    k_scale: float,
    v_scale: float,
    index_q_dtype: torch.dtype | None,
) -> None:
    _check_kv_pages(k_pages, v_pages, k_scale, v_scale)
    _check_index_pages(index_k_pages)
    _, num_kv_heads, _, head_dim = k_pages.shape
    index_dim = index_k_pages.shape[2]
    num_tokens = slot_mapping.shape[0]
    width = (num_heads + 2 * num_kv_heads) * head_dim + (num_kv_heads + 1) * index_dim
    meaning = f"{num_heads} query, {num_kv_heads} key, value and index query heads and an index key for each slot"
    _check_dtype("projected", projected, COMPUTE_DTYPES)
    _check_shape("projected", projected, (num_tokens, width), meaning)
    _check_int64("slot_mapping", slot_mapping)
    _check_int64("positions", positions)
    _check_shape("positions", positions, (num_tokens,), "one a slot")
    for name, weight, dim in (
        ("q_weight", q_weight, head_dim),
        ("k_weight", k_weight, head_dim),
        ("index_q_weight", index_q_weight, index_dim),
        ("index_k_weight", index_k_weight, index_dim),
    ):
        _check_shape(name, weight, (dim,), "one factor a channel")
    rotary_dim = cos_sin_cache.shape[-1]
    if cos_sin_cache.dim() != 2 or rotary_dim % 2 or not 0 < rotary_dim <= min(head_dim, index_dim):
        raise ValueError(
            f"cos_sin_cache has shape {tuple(cos_sin_cache.shape)}, but must be (max_positions, rotary_dim) with an "
            f"even rotary_dim of at most {min(head_dim, index_dim)}, the channels of a head; pass cosines, then sines"
        )
    if index_q_dtype not in (None, projected.dtype, torch.float8_e4m3fn):
        raise ValueError(
            f"index_q_dtype is {index_q_dtype}, but must be torch.float8_e4m3fn or {projected.dtype} like projected; "
            "leave it out"
        )
    for name, x in (("projected", projected), ("positions", positions), ("slot_mapping", slot_mapping)):
        if x.stride(-1) != 1:
            raise ValueError(f"{name} has stride {x.stride(-1)} on its last axis, but must have 1; make it contiguous")


def check_select_blocks(index_q: Tensor, index_k_pages: Tensor, topk: int, init_blocks: int, local_blocks: int) -> None:
    _check_index_pages(index_k_pages)
    if index_q.dtype != torch.float8_e4m3fn or index_k_pages.dtype != torch.float8_e4m3fn:  # fp8 products take both
        _check_dtype("index_q", index_q, COMPUTE_DTYPES)
    if index_q.dim() != 3 or index_q.shape[2] != index_k_pages.shape[2]:
        raise ValueError(
            f"index_q has shape {tuple(index_q.shape)}, but must be (num_tokens, num_index_heads, "
            f"{index_k_pages.shape[2]}) to match the index keys in the cache; reshape it"
        )
    if init_blocks < 0 or local_blocks < 0:
        raise ValueError(f"init_blocks={init_blocks}, local_blocks={local_blocks}, but neither may be negative; use 0")
    if topk < max(1, init_blocks + local_blocks):
        raise ValueError(
            f"topk is {topk}, but must be at least 1 and hold the {init_blocks} init + {local_blocks} local blocks "
            "that are forced in; raise topk or force fewer"
        )


def check_sparse_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_ids: Tensor,
    scale: float,
    k_scale: float,
    v_scale: float,
    out: Tensor | None,
) -> None:
    _check_kv_pages(k_pages, v_pages, k_scale, v_scale)
    if not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}, but must be positive and finite; pass head_dim ** -0.5")
    _check_dtype("q", q, COMPUTE_DTYPES)
    _, num_kv_heads, _, head_dim = k_pages.shape
    if q.dim() != 3 or q.shape[2] != head_dim:
        raise ValueError(
            f"q has shape {tuple(q.shape)}, but must be (num_tokens, num_heads, {head_dim}) to match the keys in the "
            "cache; reshape it"
        )
    num_tokens, num_heads, _ = q.shape
    if num_heads % num_kv_heads:
        raise ValueError(
            f"q has {num_heads} heads, but the cache has {num_kv_heads} KV heads and each must serve equally many; "
            "pass a multiple"
        )
    if block_ids.dim() != 3 or block_ids.shape[2] == 0 or block_ids.dtype != torch.int32:
        raise ValueError(
            f"block_ids is {block_ids.dtype} of shape {tuple(block_ids.shape)}, but must be torch.int32 of shape "
            "(num_kv_heads, num_tokens, topk); pass what select_blocks returns"
        )
    if block_ids.shape[0] != num_kv_heads:
        raise ValueError(
            f"block_ids come from {block_ids.shape[0]} index heads, but the cache has {num_kv_heads} KV heads and "
            "blocks are selected once for each; pass as many index heads to select_blocks"
        )
    if block_ids.shape[1] != num_tokens:
        raise ValueError(
            f"block_ids are of {block_ids.shape[1]} tokens, but q has {num_tokens}; pass both with the same padding"
        )
    if out is not None and out.shape != q.shape:
        raise ValueError(f"out has shape {tuple(out.shape)}, but must be {tuple(q.shape)} like q; allocate it like q")


def _check_kv_pages(k_pages: Tensor, v_pages: Tensor, k_scale: float, v_scale: float) -> None:
    for name, pages, scale in (("k_pages", k_pages, k_scale), ("v_pages", v_pages, v_scale)):
        if pages.dim() != 4 or pages.shape[2] != BLOCK_SIZE:
            raise ValueError(
                f"{name} has shape {tuple(pages.shape)}, but must be (num_pages, num_kv_heads, {BLOCK_SIZE}, "
                f"head_dim); start the engine with KV pages (blocks) of {BLOCK_SIZE} tokens"
            )
        _check_cache(name, pages)
        if scale != 1.0 and pages.dtype not in FP8_DTYPES:
            raise ValueError(f"{name} is {pages.dtype} with scale {scale}, but only fp8 pages are scaled; pass 1.0")
    if k_pages.shape != v_pages.shape:
        raise ValueError(
            f"k_pages has shape {tuple(k_pages.shape)} and v_pages {tuple(v_pages.shape)}, but both must be the same; "
            "pass the two halves of one cache"
        )


def _check_index_pages(index_k_pages: Tensor) -> None:
    if index_k_pages.dim() != 3 or index_k_pages.shape[1] != BLOCK_SIZE:
        raise ValueError(
            f"index_k_pages has shape {tuple(index_k_pages.shape)}, but must be (num_pages, {BLOCK_SIZE}, index_dim); "
            f"start the engine with KV pages (blocks) of {BLOCK_SIZE} tokens"
        )
    _check_cache("index_k_pages", index_k_pages)


def _check_cache(name: str, pages: Tensor) -> None:
    _check_dtype(name, pages, COMPUTE_DTYPES + FP8_DTYPES)
    if pages.stride(-1) != 1:
        raise ValueError(
            f"{name} has stride {pages.stride(-1)} on its last axis, but vectors must be contiguous (stride 1); "
            "permute other axes only"
        )


def _check_dtype(name: str, x: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if x.dtype not in allowed:
        raise ValueError(f"{name} is {x.dtype}, but must be one of {', '.join(map(str, allowed))}; convert it")


def _check_int64(name: str, x: Tensor) -> None:
    if x.dtype != torch.int64:
        raise ValueError(f"{name} is {x.dtype}, but must be torch.int64; convert it")


def _check_shape(name: str, x: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, but must be {shape}, {meaning}; slice or reshape it")
