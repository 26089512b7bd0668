"""The one metadata object every kernel takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_SIZE = 128
"""Tokens in a KV-cache page and in a sparse block: one page is one block."""


@dataclass(frozen=True)
class Batch:
    """Ragged rows of query tokens over paged contexts.

    A row is one sequence with any number of new tokens: a prompt, a chunk of one, a decode step,
    a draft to verify, or padding (zero new tokens, or a zero length). The new tokens are the last
    ``query_len`` of the sequence's ``seq_len`` tokens and are already in the cache when attention runs.

    Attributes:
        cu_seqlens_q: ``[num_seqs + 1]`` int32. Row ``i`` owns the query tokens
            ``cu_seqlens_q[i]:cu_seqlens_q[i + 1]``. Tokens from ``cu_seqlens_q[-1]`` on are padding.
        seq_lens: ``[num_seqs]`` int32, tokens in the sequence, the new ones counted.
        context_lens: ``[num_seqs]`` int32, tokens that were there before: ``seq_lens`` less the row's length.
        block_table: ``[num_seqs, max_pages]`` int32. Entry ``[i, j]`` is the page of the tokens
            ``128 * j`` to ``128 * j + 127`` of row ``i``. Entries past the sequence's last page are garbage.
        max_query_len: upper bound of the row lengths.
        max_seq_len: upper bound of ``seq_lens``.
        min_context_len: lower bound of ``context_lens`` over rows with new tokens. 0 is always right; a better one
            spares a GPU the launch of kernels that would find nothing to do.
    """

    cu_seqlens_q: Tensor
    seq_lens: Tensor
    context_lens: Tensor
    block_table: Tensor
    max_query_len: int
    max_seq_len: int
    min_context_len: int = 0

    @property
    def num_seqs(self) -> int:
        return self.seq_lens.shape[0]
