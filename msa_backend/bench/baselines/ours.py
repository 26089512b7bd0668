"""This project's kernels, by their public API; the reference too. No other module of the bench calls them."""

from __future__ import annotations

import torch
from torch import Tensor

from msa_backend.bench.baselines import Bound, Layer
from msa_backend.bench.inputs import Inputs, Projection
from msa_backend.kernels import api, checks, reference


def unavailable(device: torch.device) -> str | None:
    return None


def select(inputs: Inputs) -> Tensor:
    """``[num_kv_heads, num_tokens, topk]`` block ids."""
    return api.select_blocks(_index_q(inputs), inputs.index_k_pages, inputs.batch, topk=inputs.case.topk)


def attend(inputs: Inputs, block_ids: Tensor, out: Tensor | None = None) -> Tensor:
    """``[num_tokens, num_heads, dim]``: ``out`` if given."""
    return api.sparse_attention(
        inputs.q, inputs.k_pages, inputs.v_pages, block_ids, inputs.batch, scale=inputs.scale, out=out
    )


def bind(inputs: Inputs, block_ids: Tensor | None) -> Bound:
    out = torch.empty_like(inputs.q)
    return Bound(lambda: attend(inputs, block_ids, out), lambda: select(inputs), poisoned=out)


def layer(inputs: Inputs, projection: Projection) -> Layer:
    out = torch.empty_like(inputs.q)

    def write() -> object:
        return api.norm_rope_write(
            projection.projected,
            projection.positions,
            projection.cos_sin_cache,
            projection.norm_weight,
            projection.norm_weight,
            projection.norm_weight,
            projection.norm_weight,
            inputs.k_pages,
            inputs.v_pages,
            inputs.index_k_pages,
            projection.slot_mapping,
            num_heads=inputs.case.num_heads,
            eps=projection.eps,
            index_q_dtype=_index_q(inputs).dtype,
        )

    return Layer(write, lambda: attend(inputs, select(inputs), out))


def bind_reference(inputs: Inputs, block_ids: Tensor | None) -> Bound:
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


def _index_q(inputs: Inputs) -> Tensor:
    """In e4m3 if the API takes it, or else the same numbers in 16 bits."""
    if inputs.index_q_fp8 is None:
        return inputs.index_q
    try:
        checks.check_select_blocks(inputs.index_q_fp8, inputs.index_k_pages, inputs.case.topk, 0, 1)
    except ValueError:
        return inputs.index_q
    return inputs.index_q_fp8
