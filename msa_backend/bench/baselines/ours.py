"""This project's kernels, by their public API."""

from __future__ import annotations

import torch
from torch import Tensor

from msa_backend.bench.baselines import Bound
from msa_backend.bench.inputs import Inputs
from msa_backend.kernels import api, checks


def unavailable(device: torch.device) -> str | None:
    return None


def bind(inputs: Inputs, block_ids: Tensor | None) -> Bound:
    out = torch.empty_like(inputs.q)
    index_q = _index_q(inputs)

    def select() -> Tensor:
        return api.select_blocks(index_q, inputs.index_k_pages, inputs.batch, topk=inputs.case.topk)

    def attend() -> Tensor:
        return api.sparse_attention(
            inputs.q, inputs.k_pages, inputs.v_pages, block_ids, inputs.batch, scale=inputs.scale, out=out
        )

    return Bound(attend, select, poisoned=out)


def _index_q(inputs: Inputs) -> Tensor:
    """In e4m3 if the API takes it, or else the same numbers in 16 bits."""
    if inputs.index_q_fp8 is None:
        return inputs.index_q
    try:
        checks.check_select_blocks(inputs.index_q_fp8, inputs.index_k_pages, inputs.case.topk, 0, 1)
    except ValueError:
        return inputs.index_q
    return inputs.index_q_fp8
