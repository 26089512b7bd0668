"""How many blocks a query attends to, and which of them whatever they score."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Selection:
    """The choice that a model makes, the same in all its sparse layers.

    Attributes:
        topk: blocks that a (query token, KV head) attends to, the forced ones counted.
        init_blocks: how many of them are the first of the sequence.
        local_blocks: how many are the newest that the query sees, its own counted.

    Raises:
        ValueError: a negative number, or ``topk`` less than the blocks that are forced in.
    """

    topk: int
    init_blocks: int = 0
    local_blocks: int = 1

    def __post_init__(self) -> None:
        if self.init_blocks < 0 or self.local_blocks < 0:
            raise ValueError(
                f"init_blocks={self.init_blocks}, local_blocks={self.local_blocks}, but neither may be negative; use 0"
            )
        if self.topk < max(1, self.init_blocks + self.local_blocks):
            raise ValueError(
                f"topk is {self.topk}, but must be at least 1 and hold the {self.init_blocks} init + "
                f"{self.local_blocks} local blocks that are forced in; raise topk or force fewer"
            )
