"""Dense FlashAttention-3, the build that vLLM ships, over the same paged cache: what a model without MSA pays."""

from __future__ import annotations

import torch
from torch import Tensor

from msa_backend.bench.baselines import Bound, UnsupportedCaseError
from msa_backend.bench.inputs import Inputs


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

    if inputs.case.fp8_kv or inputs.case.dtype == "fp32":
        raise UnsupportedCaseError("FlashAttention-3 takes 16-bit queries with keys and values of the same dtype only")
    batch, out = inputs.batch, torch.empty_like(inputs.q)

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
        )
        return out

    return Bound(attend, poisoned=out)
