"""What a step asks of the kernels: ragged sequences over a paged cache, and the parts a step is cut into."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_SIZE = 128
"""Tokens in a KV-cache page and in a sparse block: one page is one block."""


@dataclass(frozen=True)
class Batch:
    """Sequences with any number of new query tokens each, over paged contexts.

    A sequence brings a prompt, a chunk of one, a decode step, drafts to verify, or nothing. Its query tokens are the
    last ``query_len`` of its ``seq_len`` tokens and are already in the cache when attention runs. One with a length
    of 0 or less is padding, whatever its query length.

    Attributes:
        cu_seqlens_q: ``[num_seqs + 1]`` int32. Sequence ``i`` owns the query tokens
            ``cu_seqlens_q[i]:cu_seqlens_q[i + 1]``. Tokens from ``cu_seqlens_q[-1]`` on are padding.
        seq_lens: ``[num_seqs]`` int32, tokens in the sequence, the new ones counted.
        block_table: ``[num_seqs, max_pages]`` int32. Entry ``[i, j]`` is the page of the tokens
            ``128 * j`` to ``128 * j + 127`` of sequence ``i``. Entries past its last page are garbage.
        max_query_len: upper bound of the query lengths.
        max_seq_len: upper bound of ``seq_lens``.
        kept: what an implementation works out of a batch once, for all layers of a step.
    """

    cu_seqlens_q: Tensor
    seq_lens: Tensor
    block_table: Tensor
    max_query_len: int
    max_seq_len: int
    kept: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def num_seqs(self) -> int:
        return self.seq_lens.shape[0]

    @property
    def max_blocks(self) -> int:
        """Most blocks that a token may see."""
        return min(-(-self.max_seq_len // BLOCK_SIZE), self.block_table.shape[1])

    @cached_property
    def context_lens(self) -> Tensor:
        """``[num_seqs]`` int32, tokens before the new ones; meaningless for padding."""
        return self.seq_lens - (self.cu_seqlens_q[1:] - self.cu_seqlens_q[:-1])

    def forget_lengths(self) -> None:
        """Work everything out anew: the numbers in ``seq_lens`` or ``block_table`` have changed in place."""
        self.kept.clear()
        self.__dict__.pop("context_lens", None)


@dataclass(frozen=True)
class Part:
    """Neighbouring sequences of a step that one set of kernels serves.

    Attributes:
        tokens: where their query tokens lie in the step.
        batch: the sequences; their query tokens start at 0.
    """

    tokens: slice
    batch: Batch


@dataclass(frozen=True)
class Step:
    """One forward pass of an engine, the same for all its sparse layers.

    Attributes:
        num_tokens: query tokens in the step; any more that a layer is given are padding.
        parts: that the tokens are cut into.
    """

    num_tokens: int
    parts: tuple[Part, ...]
