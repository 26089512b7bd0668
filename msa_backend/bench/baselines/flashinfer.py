"""Dense FlashInfer over the same paged cache. It compiles its kernels at first use, which can take minutes."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from msa_backend.bench.baselines import Bound
from msa_backend.bench.cases import BLOCK_SIZE
from msa_backend.bench.inputs import Inputs

WORKSPACE_BYTES = 2**29


def unavailable(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "FlashInfer needs a GPU"
    try:
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper  # noqa: F401
    except Exception as error:  # its import raises whatever its extensions raise
        return f"FlashInfer does not import: {type(error).__name__}: {error}"
    return None


@cache
def _workspace(device: torch.device) -> Tensor:
    """One for all inputs: their calls follow each other."""
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def bind(inputs: Inputs, block_ids: Tensor | None) -> Bound:
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    case, batch = inputs.case, inputs.batch
    pages = [-(-length // BLOCK_SIZE) for length in case.lengths]
    wrapper = BatchPrefillWithPagedKVCacheWrapper(_workspace(inputs.q.device), "HND")
    wrapper.plan(
        batch.cu_seqlens_q,
        torch.tensor([0, *pages], dtype=torch.int32).cumsum(0).int().to(inputs.q.device),
        torch.cat([row[:count] for row, count in zip(batch.block_table, pages, strict=True)]),
        (batch.seq_lens - 1) % BLOCK_SIZE + 1,
        case.num_heads,
        case.num_kv_heads,
        case.dim,
        BLOCK_SIZE,
        causal=True,
        sm_scale=inputs.scale,
        q_data_type=inputs.q.dtype,
        kv_data_type=inputs.kv_pages.dtype,
    )
    out = torch.empty_like(inputs.q)

    def attend() -> Tensor:
        wrapper.run(inputs.q, (inputs.k_pages, inputs.v_pages), out=out)
        return out

    return Bound(attend, poisoned=out)
