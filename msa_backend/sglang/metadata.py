"""From SGLang's batch description to the kernels': once a step, for all sparse layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from msa_backend.attend import cut, whole
from msa_backend.kernels.batch import BLOCK_SIZE, Step

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class LastingBuffers:
    """What a CUDA graph reads, at addresses that stay: a row for each request of its largest batch."""

    def __init__(self, max_rows: int, req_to_token: torch.Tensor) -> None:
        device = req_to_token.device
        max_pages = -(-req_to_token.shape[1] // BLOCK_SIZE)
        self.max_rows = max_rows
        self.seq_lens = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self.block_table = torch.zeros(max_rows, max_pages, dtype=torch.int32, device=device)
        self._bounds: dict[int, torch.Tensor] = {}

    def bounds(self, tokens_a_row: int) -> torch.Tensor:
        """``[max_rows + 1]`` int32: 0, ``tokens_a_row``, twice as much, and on."""
        if tokens_a_row not in self._bounds:
            self._bounds[tokens_a_row] = _bounds(self.max_rows, tokens_a_row, self.seq_lens.device)
        return self._bounds[tokens_a_row]


def build(
    forward_batch: ForwardBatch,
    req_to_token: torch.Tensor,
    max_context_len: int,
    lasting: LastingBuffers | None = None,
    in_capture: bool = False,
) -> Step:
    """Describe a step.

    Args:
        req_to_token: ``[num_requests, max_tokens]`` int32, the cache slot of each token of each request.
        max_context_len: the longest a sequence can get.
        lasting: buffers of CUDA graphs, to be filled; only rows of one query length each go into graphs.
        in_capture: whether a graph is being recorded, whose bounds must then hold for every later step.
    """
    mode = forward_batch.forward_mode
    if mode.is_idle():
        return Step(0, ())
    if mode.is_decode():
        return _uniform(forward_batch, 1, 0, req_to_token, max_context_len, lasting, in_capture)
    if mode.is_target_verify():
        # The drafts are in no length yet: seq_lens are of what was accepted, extend_seq_lens are None.
        drafts: Any = forward_batch.spec_info
        return _uniform(
            forward_batch,
            drafts.draft_token_num,
            drafts.draft_token_num,
            req_to_token,
            max_context_len,
            lasting,
            in_capture,
        )
    return _ragged(forward_batch, req_to_token)


def _uniform(
    forward_batch: ForwardBatch,
    tokens_a_row: int,
    not_counted: int,
    req_to_token: torch.Tensor,
    max_context_len: int,
    lasting: LastingBuffers | None,
    in_capture: bool,
) -> Step:
    """Rows of ``tokens_a_row`` new tokens each, ``not_counted`` of which ``seq_lens`` lack."""
    num_rows = forward_batch.seq_lens.shape[0]
    known = None if in_capture else forward_batch.seq_lens_cpu
    max_seq_len = max_context_len
    if known is not None and num_rows:
        max_seq_len = int(known.max()) + not_counted
    if lasting is None or num_rows > lasting.max_rows:
        seq_lens = forward_batch.seq_lens.int() + not_counted
        block_table = _block_table(req_to_token, forward_batch.req_pool_indices, max_seq_len)
        bounds = _bounds(num_rows, tokens_a_row, seq_lens.device)
    else:
        # Each decode step comes by here, so: three kernels.
        seq_lens = torch.add(forward_batch.seq_lens, not_counted, out=lasting.seq_lens[:num_rows])
        block_table = lasting.block_table[:num_rows]
        pages = block_table[:, : -(-max_seq_len // BLOCK_SIZE)]
        _block_table(req_to_token, forward_batch.req_pool_indices, max_seq_len, out=pages)
        bounds = lasting.bounds(tokens_a_row)[: num_rows + 1]
    return whole(bounds, seq_lens, block_table, num_rows * tokens_a_row, tokens_a_row, max_seq_len)


def _ragged(forward_batch: ForwardBatch, req_to_token: torch.Tensor) -> Step:
    """Prompts, chunks of prompts and, behind them in a mixed batch, decode rows."""
    new = [int(length) for length in forward_batch.extend_seq_lens_cpu]
    before = [int(length) for length in forward_batch.extend_prefix_lens_cpu]
    seq_lens = [a + b for a, b in zip(before, new, strict=True)]
    new_on_device = forward_batch.extend_seq_lens.int()
    bounds = torch.zeros(len(new) + 1, dtype=torch.int32, device=new_on_device.device)
    torch.cumsum(new_on_device, 0, dtype=torch.int32, out=bounds[1:])
    block_table = _block_table(req_to_token, forward_batch.req_pool_indices, max(seq_lens, default=0))
    return cut(bounds, forward_batch.extend_prefix_lens.int() + new_on_device, block_table, new, seq_lens)


def _block_table(
    req_to_token: torch.Tensor, requests: torch.Tensor, max_seq_len: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """``[num_rows, pages]`` int32. A page's tokens lie in neighbouring slots, so its first tells which page it is."""
    return torch.floor_divide(req_to_token[:, :max_seq_len:BLOCK_SIZE][requests], BLOCK_SIZE, out=out)


def _bounds(num_rows: int, tokens_a_row: int, device: torch.device) -> torch.Tensor:
    return torch.arange(0, (num_rows + 1) * tokens_a_row, tokens_a_row, dtype=torch.int32, device=device)
