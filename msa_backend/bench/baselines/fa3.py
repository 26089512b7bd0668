"""Dense FlashAttention-3, the build that vLLM ships, over the same paged cache: what a model without MSA pays.

Captured for a bound it is called as vLLM captures it: the longest key sequence is the bound, there are at most
:data:`SPLITS` splits, and how many a sequence really gets stands in scheduler metadata, which vLLM makes anew from the
real lengths before each replay, once for all layers; so here it is made outside of what is timed. Captured for its own
length it splits by its own heuristics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from msa_backend.bench.baselines import Bound, UnsupportedCaseError
from msa_backend.bench.cases import BLOCK_SIZE
from msa_backend.bench.inputs import Inputs

SPLITS = 32
"""vLLM's default of ``flash_attn_max_num_splits_for_cuda_graph``."""


def unavailable(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "FlashAttention-3 needs a GPU"
    if torch.cuda.get_device_capability(device)[0] != 9:
        return "FlashAttention-3 needs a Hopper GPU"
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func  # noqa: F401
    except Exception as error:  # an engine's import raises whatever its extensions raise
        return f"vLLM's FlashAttention does not import: {type(error).__name__}: {error}"
    return None


def bind(inputs: Inputs, block_ids: Tensor | None) -> Bound:
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    case = inputs.case
    if case.fp8_kv or case.dtype == "fp32":
        raise UnsupportedCaseError("FlashAttention-3 takes 16-bit queries with keys and values of the same dtype only")
    batch, out = inputs.batch, torch.empty_like(inputs.q)

    captured = {"num_splits": SPLITS, "scheduler_metadata": _schedule(inputs)} if case.bound else {}

    def attend() -> Tensor:
        flash_attn_varlen_func(
            inputs.q,
            inputs.k_pages.transpose(1, 2),
            inputs.v_pages.transpose(1, 2),
            max_seqlen_q=batch.max_query_len,
            cu_seqlens_q=batch.cu_seqlens_q,
            max_seqlen_k=batch.max_seq_len,
            seqused_k=batch.seq_lens,
            softmax_scale=inputs.scale,
            causal=True,
            block_table=batch.block_table,
            out=out,
            fa_version=3,
            **captured,
        )
        return out

    return Bound(attend, poisoned=out)


def _schedule(inputs: Inputs) -> Tensor:
    from vllm.vllm_flash_attn import get_scheduler_metadata

    case, batch = inputs.case, inputs.batch
    return get_scheduler_metadata(
        batch_size=case.batch,
        max_seqlen_q=batch.max_query_len,
        max_seqlen_k=max(case.lengths),
        num_heads_q=case.num_heads,
        num_heads_kv=case.num_kv_heads,
        headdim=case.dim,
        cache_seqlens=batch.seq_lens,
        qkv_dtype=inputs.q.dtype,
        cu_seqlens_q=batch.cu_seqlens_q,
        page_size=BLOCK_SIZE,
        causal=True,
        num_splits=SPLITS,
    )
