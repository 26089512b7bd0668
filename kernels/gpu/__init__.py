"""The operations of :mod:`msa_backend.kernels.api` in Triton, for NVIDIA GPUs from SM80 up, tuned on SM90.

The host never waits for the device, and grids follow from shapes alone, so a CUDA graph may record every operation.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..batch import Batch
from . import arch, decode, fp8, prefill
from .norm_rope_write import norm_rope_write
from .write import write_cache

__all__ = ["arch", "norm_rope_write", "select_blocks", "sparse_attention", "write_cache"]

DIMS = (16, 32, 64, 128)


def select_blocks(
    index_q: Tensor, index_k_pages: Tensor, batch: Batch, *, topk: int, init_blocks: int = 0, local_blocks: int = 1
) -> Tensor:
    """See :func:`msa_backend.kernels.api.select_blocks`; ``index_dim`` a power of two from 16 to 128."""
    _check_dim("index_dim", index_q.shape[2])
    if index_q.dtype == torch.float8_e4m3fn and arch.capability(index_q.device) < fp8.E4M3_CAPABILITY:
        index_q = index_q.to(torch.bfloat16)  # no fp8 products there, and every e4m3 number is a bf16 one
    if index_q.shape[0] == 0:
        return torch.empty(index_q.shape[1], 0, topk, dtype=torch.int32, device=index_q.device)
    return _kernels(batch).select_blocks(
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
    """See :func:`msa_backend.kernels.api.sparse_attention`; ``head_dim`` a power of two from 16 to 128."""
    _check_dim("head_dim", q.shape[2])
    out = torch.empty_like(q) if out is None else out
    if q.shape[0] == 0:
        return out
    _kernels(batch).sparse_attention(
        q, k_pages, v_pages, block_ids, batch, scale=scale, k_scale=k_scale, v_scale=v_scale, out=out
    )
    return out


def _kernels(batch: Batch) -> ModuleType:
    return decode if batch.max_query_len <= decode.MAX_QUERY_LEN else prefill


def _check_dim(name: str, dim: int) -> None:
    if dim not in DIMS:
        raise ValueError(f"{name} is {dim}, but the GPU kernels take {', '.join(map(str, DIMS))}; run on the CPU")
