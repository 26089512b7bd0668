"""This project's kernels, by their public API."""

from __future__ import annotations

import torch
from torch import Tensor

from msa_backend.bench.baselines import Bound
from msa_backend.bench.inputs import Inputs
from msa_backend.kernels import api


def unavailable(device: torch.device) -> str | None:
    return None


def bind(inputs: Inputs, block_ids: Tensor | None) -> Bound:
    out = torch.empty_like(inputs.q)
    index_q = inputs.index_q if inputs.index_q_fp8 is None else inputs.index_q_fp8

    def select() -> Tensor:
        return api.select_blocks(index_q, inputs.index_k_pages, inputs.batch, topk=inputs.case.topk)

    def attend() -> Tensor:
        return api.sparse_attention(
            inputs.q, inputs.k_pages, inputs.v_pages, block_ids, inputs.batch, scale=inputs.scale, out=out
        )

    return Bound(attend, select, poisoned=out)
