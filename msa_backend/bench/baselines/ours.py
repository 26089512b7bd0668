"""This project's kernels, by their public API; the reference too. No other module of the bench calls them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from msa_backend.bench.baselines import Bound, Layer
from msa_backend.bench.inputs import Inputs, Projection
from msa_backend.kernels import api, checks, reference


def unavailable(device: torch.device) -> str | None:
    return None


def select(inputs: Inputs) -> Tensor:
    """``[num_kv_heads, num_tokens, topk]`` block ids."""
    return api.select_blocks(_index_q(inputs), inputs.caches, inputs.batch, _selection(inputs))


def attend(inputs: Inputs, block_ids: Tensor, out: Tensor | None = None) -> Tensor:
    """``[num_tokens, num_heads, dim]``: ``out`` if given."""
    return api.sparse_attention(inputs.q, inputs.caches, block_ids, inputs.batch, inputs.scale, out)


def bind(inputs: Inputs, block_ids: Tensor | None) -> Bound:
    out = torch.empty_like(inputs.q)
    index_q, selection = _index_q(inputs), _selection(inputs)

    def whole(batch: api.Batch = inputs.batch) -> Tensor:
        return api.attend(inputs.q, index_q, inputs.caches, batch, selection, inputs.scale, out)

    def first_layer() -> Tensor:
        """As the first layer of a step, which plans it for all."""
        return whole(replace(inputs.batch))

    parts = {"first layer": first_layer} if inputs.q.is_cuda else {}
    return Bound(lambda: attend(inputs, block_ids, out), lambda: select(inputs), parts, whole, poisoned=out)


def layer(inputs: Inputs, projection: Projection) -> Layer:
    out = torch.empty_like(inputs.q)
    index_q, selection = _index_q(inputs), _selection(inputs)
    weight = projection.norm_weight
    norms = api.HeadNorms(weight, weight, weight, weight, projection.cos_sin_cache, projection.eps)

    def write() -> object:
        return api.norm_rope_write(
            projection.projected,
            projection.positions,
            norms,
            inputs.caches,
            projection.slot_mapping,
            index_q_dtype=index_q.dtype,
        )

    def attend_whole() -> object:
        return api.attend(inputs.q, index_q, inputs.caches, inputs.batch, selection, inputs.scale, out)

    return Layer(write, attend_whole)


def bind_reference(inputs: Inputs, block_ids: Tensor | None) -> Bound:
    def select() -> Tensor:
        return reference.select_blocks(
            inputs.index_q, inputs.caches, inputs.batch, _selection(inputs), dtype=torch.float32
        )

    def attend() -> Tensor:
        assert block_ids is not None
        return reference.sparse_attention(
            inputs.q, inputs.caches, block_ids, inputs.batch, inputs.scale, dtype=torch.float32
        )

    return Bound(attend, select)


def _selection(inputs: Inputs) -> api.Selection:
    return api.Selection(inputs.case.topk)


def _index_q(inputs: Inputs) -> Tensor:
    """In e4m3 if the API takes it, or else the same numbers in 16 bits."""
    if inputs.index_q_fp8 is None:
        return inputs.index_q
    try:
        checks.check_select_blocks(inputs.index_q_fp8, inputs.caches)
    except ValueError:
        return inputs.index_q
    return inputs.index_q_fp8
