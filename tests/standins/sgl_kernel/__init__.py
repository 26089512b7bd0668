"""A stand-in for `sgl_kernel`, SGLang's compiled kernels, which PyPI has no CPU build of.

For tests and `make serve-sglang` alone: tools/setup_env.py puts this folder on the path of that environment, and
it is in no wheel of ours. What SGLang calls when it serves text on a CPU is here in torch. It also imports a dozen
other names while it loads; those exist, and raise one clear sentence when they are called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Write each request's new slots into its row of the table.

    Args:
        req_pool_indices: row of each request, `[requests]`.
        req_to_token: slot of every position, `[rows, pool_len]`, written to.
        start_offset: first position to write of each request, `[requests]`.
        end_offset: the position after the last, `[requests]`.
        out_cache_loc: the slots, those of the first request first.
        pool_len: width of the table; only pointers need it.
    """
    taken = 0
    for row, start, end in zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True):
        req_to_token[row, start:end] = out_cache_loc[taken : taken + end - start].to(req_to_token.dtype)
        taken += end - start


def assign_extend_cache_locs_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """The way back: collect the slots of positions `start_offset` to `end_offset` of each request, one after another.

    Arguments as above, but `req_to_token` is read and `out_cache_loc` written to.
    """
    taken = 0
    for row, start, end in zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True):
        out_cache_loc[taken : taken + end - start] = req_to_token[row, start:end].to(out_cache_loc.dtype)
        taken += end - start


def assign_draft_cache_locs_contiguous_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    seq_lens: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
    topk: int,
    num_steps: int,
) -> None:
    """Collect `topk * num_steps` slots of each request, from the end of its sequence on."""
    ends = seq_lens + topk * num_steps
    assign_extend_cache_locs_cpu(req_pool_indices, req_to_token, seq_lens, ends, out_cache_loc, pool_len)


def _missing(name: str) -> Callable[..., NoReturn]:
    def missing(*_args: object, **_kwargs: object) -> NoReturn:
        raise NotImplementedError(
            f"sgl_kernel.{name} was called, but this is only a stand-in for sgl_kernel, for text on a CPU; "
            "install sglang-kernel on a machine with a GPU"
        )

    return missing


def __getattr__(name: str) -> Callable[..., NoReturn]:
    """Any other name: a function, because SGLang imports many that it never calls here."""
    if name.startswith("__"):
        raise AttributeError(name)
    return _missing(name)


# Operators that a model's vision half is bound to when its module loads. No others: SGLang asks with `hasattr` which
# there are, and would take the fast path of a processor that a stand-in does not know.
for _name in (
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
    "fused_sigmoid_mul_cpu",
):
    setattr(torch.ops.sgl_kernel, _name, _missing(_name))
