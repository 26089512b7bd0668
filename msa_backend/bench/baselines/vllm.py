"""vLLM's in-tree kernels for MiniMax-M3: Triton, on its own cache layout.

In a graph vLLM gives the indexer ``max_model_len`` for ``max_seq_len`` (0.33, ``model_states/default.py``, for capture)
and block tables as wide: from it follow the width of the scores and the blocks that a program of the top-k takes. How
many programs score follows from the number of requests alone, and attention takes no bound at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from msa_backend.bench.baselines import Bound, Layer
from msa_backend.bench.cases import BLOCK_SIZE
from msa_backend.bench.inputs import Inputs, Projection
from msa_backend.bench.timing import Call


def unavailable(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "vLLM's kernels for MiniMax-M3 need a GPU"
    try:
        from vllm.models.minimax_m3.common.ops import index_topk, sparse_attn  # noqa: F401
    except Exception as error:  # an engine's import raises whatever its extensions raise
        return f"vLLM's kernels do not import: {type(error).__name__}: {error}"
    return None


def bind(inputs: Inputs, block_ids: Tensor | None) -> Bound:
    select, attend, parts, out = _decode(inputs) if inputs.case.in_graph else _chunk(inputs)
    return Bound(lambda: attend(block_ids), select, parts, poisoned=out)


def layer(inputs: Inputs, projection: Projection) -> Layer:
    """``write`` is the fused operation of vLLM's CUDA extension; it raises where that is not loaded or lacks it."""
    from vllm import _custom_ops as ops

    case = inputs.case
    q_width, index_width = case.num_heads * case.dim, case.num_kv_heads * case.dim

    def write() -> None:
        projected, weight = projection.projected, projection.norm_weight
        q = projected.new_empty(case.num_tokens, q_width)
        index_q = projected.new_empty(case.num_tokens, index_width, dtype=inputs.index_k_pages.dtype)
        ops.fused_minimax_m3_qknorm_rope_kv_insert(
            projected,
            weight,
            weight,
            projection.cos_sin_cache,
            projection.positions,
            case.num_heads,
            case.num_kv_heads,
            projection.cos_sin_cache.shape[1],
            projection.eps,
            weight,
            weight,
            case.num_kv_heads,
            projection.slot_mapping,
            projection.slot_mapping,
            inputs.kv_pages,
            inputs.index_k_pages,
            BLOCK_SIZE,
            q,
            index_q,
            "fp8" if case.fp8_kv else "auto",
        )

    select, attend, _, _ = _decode(inputs) if case.in_graph else _chunk(inputs)
    return Layer(write, lambda: attend(select()))


class _Calls(NamedTuple):
    select: Callable[[], Tensor]
    attend: Callable[[Tensor], Tensor]
    """Of block ids."""
    parts: dict[str, Call]
    out: Tensor


def _decode(inputs: Inputs) -> _Calls:
    """Rows of equally many tokens, few of them."""
    from vllm.models.minimax_m3.common.ops import index_topk, sparse_attn

    case, batch, out = inputs.case, inputs.batch, torch.empty_like(inputs.q)
    index_q = inputs.index_q if inputs.index_q_fp8 is None else inputs.index_q_fp8
    heads, new_tokens = case.num_kv_heads, case.new_tokens

    def select() -> Tensor:
        return index_topk.minimax_m3_index_decode(
            index_q,
            inputs.index_k_pages,
            batch.block_table,
            batch.seq_lens,
            batch.max_seq_len,
            case.topk,
            0,
            1,
            heads,
            new_tokens,
            new_tokens,
        )

    def attend(block_ids: Tensor) -> Tensor:
        sparse_attn.minimax_m3_sparse_attn_decode(
            inputs.q,
            inputs.kv_pages,
            block_ids,
            batch.block_table,
            batch.seq_lens,
            heads,
            inputs.scale,
            out,
            new_tokens,
        )
        return out

    return _Calls(select, attend, {}, out)


def _chunk(inputs: Inputs) -> _Calls:
    from vllm.models.minimax_m3.common.ops import index_topk, sparse_attn

    case, batch, out = inputs.case, inputs.batch, torch.empty_like(inputs.q)
    index_q = inputs.index_q if inputs.index_q_fp8 is None else inputs.index_q_fp8
    rows = (batch.block_table, batch.cu_seqlens_q, batch.seq_lens, inputs.context_lens)

    def score() -> Tensor:
        return index_topk.minimax_m3_index_score(
            index_q, inputs.index_k_pages, *rows, batch.max_query_len, batch.max_seq_len, case.num_kv_heads
        )

    def top_k(scores: Tensor) -> Tensor:
        return index_topk.minimax_m3_index_topk(
            scores, batch.cu_seqlens_q, inputs.context_lens, batch.max_query_len, case.topk, 0, 1
        )

    def attend(block_ids: Tensor) -> Tensor:
        sparse_attn.minimax_m3_sparse_attn(
            inputs.q,
            inputs.kv_pages,
            block_ids,
            *rows,
            batch.max_query_len,
            case.num_kv_heads,
            inputs.scale,
            out,
        )
        return out

    scored = score()
    return _Calls(lambda: top_k(score()), attend, {"score": score, "top-k": lambda: top_k(scored)}, out)
