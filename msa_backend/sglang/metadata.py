"""From SGLang's batch description to the kernels': once a step, for all sparse layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from msa_backend.kernels.batch import BLOCK_SIZE, Batch

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


@dataclass(frozen=True)
class Rows:
    """Neighbouring rows of a step.

    Attributes:
        batch: the rows; their query tokens start at 0.
        tokens: where these lie in the step.
    """

    batch: Batch
    tokens: slice


@dataclass(frozen=True)
class MSAMetadata:
    """One step.

    Attributes:
        num_tokens: new tokens in the step; any more are padding.
        rows: prefill rows and decode rows apart, where there are both; drafts to verify count as decode.
    """

    num_tokens: int
    rows: tuple[Rows, ...]


class LastingBuffers:
    """What a CUDA graph reads, at addresses that stay: a row for each request of its largest batch."""

    def __init__(self, max_rows: int, req_to_token: torch.Tensor) -> None:
        device = req_to_token.device
        max_pages = -(-req_to_token.shape[1] // BLOCK_SIZE)
        self.max_rows = max_rows
        self.seq_lens = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self.context_lens = torch.zeros(max_rows, dtype=torch.int32, device=device)
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
) -> MSAMetadata:
    """Describe a step.

    Args:
        req_to_token: ``[num_requests, max_tokens]`` int32, the cache slot of each token of each request.
        max_context_len: the longest a sequence can get.
        lasting: buffers of CUDA graphs, to be filled; only rows of one query length each go into graphs.
        in_capture: whether a graph is being recorded, whose bounds must then hold for every later step.
    """
    mode = forward_batch.forward_mode
    if mode.is_idle():
        return MSAMetadata(0, ())
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
) -> MSAMetadata:
    """Rows of ``tokens_a_row`` new tokens each, ``not_counted`` of which ``seq_lens`` lack."""
    num_rows = forward_batch.seq_lens.shape[0]
    seq_lens = forward_batch.seq_lens.int() + not_counted
    context_lens = seq_lens - tokens_a_row
    known = None if in_capture else forward_batch.seq_lens_cpu
    max_seq_len, min_context_len = max_context_len, 0
    if known is not None and num_rows:
        max_seq_len = int(known.max()) + not_counted
        min_context_len = max(0, int(known.min()) + not_counted - tokens_a_row)
    if lasting is None or num_rows > lasting.max_rows:
        block_table = _block_table(req_to_token, forward_batch.req_pool_indices, max_seq_len)
        bounds = _bounds(num_rows, tokens_a_row, seq_lens.device)
    else:
        seq_lens = lasting.seq_lens[:num_rows].copy_(seq_lens)
        context_lens = lasting.context_lens[:num_rows].copy_(context_lens)
        pages = _block_table(req_to_token, forward_batch.req_pool_indices, max_seq_len)
        block_table = lasting.block_table[:num_rows]
        block_table[:, : pages.shape[1]].copy_(pages)
        bounds = lasting.bounds(tokens_a_row)[: num_rows + 1]
    batch = Batch(bounds, seq_lens, context_lens, block_table, tokens_a_row, max_seq_len, min_context_len)
    num_tokens = num_rows * tokens_a_row
    return MSAMetadata(num_tokens, (Rows(batch, slice(0, num_tokens)),))


def _ragged(forward_batch: ForwardBatch, req_to_token: torch.Tensor) -> MSAMetadata:
    """Prompts, chunks of prompts and, behind them in a mixed batch, decode rows."""
    new = [int(length) for length in forward_batch.extend_seq_lens_cpu]
    before = [int(length) for length in forward_batch.extend_prefix_lens_cpu]
    num_rows = len(new)
    first_decode = num_rows
    while first_decode and new[first_decode - 1] == 1:
        first_decode -= 1

    context_lens = forward_batch.extend_prefix_lens.int()
    new_on_device = forward_batch.extend_seq_lens.int()
    rows, start = [], 0
    for first, last in ((0, first_decode), (first_decode, num_rows)):
        num_tokens = sum(new[first:last])
        if not num_tokens:
            continue
        here = slice(first, last)
        max_seq_len = max(a + b for a, b in zip(before[here], new[here], strict=True))
        bounds = torch.zeros(last - first + 1, dtype=torch.int32, device=context_lens.device)
        torch.cumsum(new_on_device[here], 0, dtype=torch.int32, out=bounds[1:])
        batch = Batch(
            cu_seqlens_q=bounds,
            seq_lens=context_lens[here] + new_on_device[here],
            context_lens=context_lens[here],
            block_table=_block_table(req_to_token, forward_batch.req_pool_indices[here], max_seq_len),
            max_query_len=max(new[here]),
            max_seq_len=max_seq_len,
            min_context_len=min(before[here]),
        )
        rows.append(Rows(batch, slice(start, start + num_tokens)))
        start += num_tokens
    return MSAMetadata(start, tuple(rows))


def _block_table(req_to_token: torch.Tensor, requests: torch.Tensor, max_seq_len: int) -> torch.Tensor:
    """``[num_rows, pages]`` int32. A page's tokens lie in neighbouring slots, so its first tells which page it is."""
    return (req_to_token[:, :max_seq_len:BLOCK_SIZE][requests] // BLOCK_SIZE).int()


def _bounds(num_rows: int, tokens_a_row: int, device: torch.device) -> torch.Tensor:
    return torch.arange(0, (num_rows + 1) * tokens_a_row, tokens_a_row, dtype=torch.int32, device=device)
