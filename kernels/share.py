"""Whose work the scoring of a block is, where several ranks hold the same index keys."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """Each ``ranks``-th block of every sequence, from block ``rank`` on.

    Interleaved, so that a rank's work is the same share of any length, and of what each query of a prompt sees.

    Attributes:
        rank: whose share it is.
        ranks: that share the blocks.

    Raises:
        ValueError: no such rank.
    """

    rank: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.ranks:
            raise ValueError(
                f"rank is {self.rank}, but must be one of {self.ranks} ranks, counted from 0; pass another"
            )

    @property
    def blocks(self) -> slice:
        """Of a sequence's blocks in a row."""
        return slice(self.rank, None, self.ranks)


ALL = Share()
