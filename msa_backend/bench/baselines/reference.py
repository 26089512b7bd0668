"""The definition in fp32, on a CPU: what the vectorised torch path is there beside."""

from __future__ import annotations

import torch
from torch import Tensor

from msa_backend.bench.baselines import Bound
from msa_backend.bench.inputs import Inputs
from msa_backend.kernels import reference


def unavailable(device: torch.device) -> str | None:
    return None if device.type == "cpu" else "the reference is timed on a CPU only"


def bind(inputs: Inputs, block_ids: Tensor | None) -> Bound:
    def select() -> Tensor:
        return reference.select_blocks(
            inputs.index_q, inputs.index_k_pages, inputs.batch, topk=inputs.case.topk, dtype=torch.float32
        )

    def attend() -> Tensor:
        return reference.sparse_attention(
            inputs.q,
            inputs.k_pages,
            inputs.v_pages,
            block_ids,
            inputs.batch,
            scale=inputs.scale,
            dtype=torch.float32,
        )

    return Bound(attend, select)
