"""vLLM's in-tree kernels for MiniMax-M3: Triton, on its own cache layout.

In a graph vLLM gives the indexer ``max_model_len`` for ``max_seq_len`` (0.33, ``model_states/default.py``, for capture)
and block tables as wide: from it follow the width of the scores and the blocks that a program of the top-k takes. How
many programs score follows from the number of requests alone, and attention takes no bound at all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from msa_backend.bench.baselines import Bound
from msa_backend.bench.inputs import Inputs


def unavailable(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "vLLM's kernels for MiniMax-M3 need a GPU"
    try:
        from vllm.models.minimax_m3.common.ops import index_topk, sparse_attn  # noqa: F401
    except Exception as error:  # an engine's import raises whatever its extensions raise
        return f"vLLM's kernels do not import: {type(error).__name__}: {error}"
    return None


def bind(inputs: Inputs, block_ids: Tensor | None) -> Bound:
    from vllm.models.minimax_m3.common.ops import index_topk, sparse_attn

    case, batch = inputs.case, inputs.batch
    heads, new_tokens = case.num_kv_heads, case.new_tokens
    index_q = inputs.index_q if inputs.index_q_fp8 is None else inputs.index_q_fp8
    rows = (batch.block_table, batch.cu_seqlens_q, batch.seq_lens, inputs.context_lens)
    out = torch.empty_like(inputs.q)

    if case.in_graph:

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

        def attend() -> Tensor:
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

        return Bound(attend, select, poisoned=out)

    def score() -> Tensor:
        return index_topk.minimax_m3_index_score(
            index_q, inputs.index_k_pages, *rows, batch.max_query_len, batch.max_seq_len, heads
        )

    def top_k(scores: Tensor) -> Tensor:
        return index_topk.minimax_m3_index_topk(
            scores, batch.cu_seqlens_q, inputs.context_lens, batch.max_query_len, case.topk, 0, 1
        )

    def attend_chunk() -> Tensor:
        sparse_attn.minimax_m3_sparse_attn(
            inputs.q, inputs.kv_pages, block_ids, *rows, batch.max_query_len, heads, inputs.scale, out
        )
        return out

    scored = score()
    parts = {"score": score, "top-k": lambda: top_k(scored)}
    return Bound(attend_chunk, lambda: top_k(score()), parts, poisoned=out)
