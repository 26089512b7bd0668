"""What is learned in which order: short texts densely, longer ones, the indexer beside it, then with blocks chosen."""

from __future__ import annotations

from dataclasses import dataclass
from math import log

from msa_backend.config import BLOCK_SIZE

from .text import Kind

LONGEST = 1 << 20
"""Far keys of the dense layer count as those of a text of so many tokens."""


@dataclass(frozen=True)
class Phase:
    """
    Attributes:
        steps: most of them.
        until: the share of answers whose first token is right, over the last ``PATIENCE`` steps, that ends the phase.
        topk: blocks that are chosen; None: attention is dense.
        lr: of AdamW.
    """

    name: str
    kind: Kind
    batch: int
    steps: int
    lr: float
    until: float = 1.0
    topk: int | None = None

    @property
    def block(self) -> int:
        """Tokens of a block. Texts of one or two blocks would teach the indexer nothing: theirs are smaller."""
        return max(8, min(BLOCK_SIZE, self.kind.length // 32))

    @property
    def far_handicap(self) -> float:
        return log(LONGEST / self.kind.length)


PATIENCE = 40

PLAN = (
    Phase("bind", Kind(128, plain=1.0, facts=4), 256, 2000, 2e-3, until=0.95),
    Phase("copy", Kind(256, plain=1.0, facts=8), 128, 4000, 2e-3, until=0.98),
    Phase("ask", Kind(512, plain=0.3, questions=3, facts=6), 64, 5000, 2e-3, until=0.985),
    Phase("notes", Kind(2048, plain=0.2, questions=8, facts=24), 16, 3000, 1e-3, until=0.985),
    Phase("index", Kind(4096, plain=0.1, questions=12, facts=32), 8, 1000, 1e-3),
    Phase("sparse", Kind(4096, plain=0.1, questions=12, facts=32), 8, 700, 1e-3, topk=16),
    Phase("sparse 8K", Kind(8192, plain=0.1, questions=16, facts=32), 4, 250, 5e-4, topk=16),
    Phase("sparse 16K", Kind(16384, plain=0.1, questions=24, facts=32), 2, 150, 5e-4, topk=16),
    Phase("sparse 32K", Kind(32768, plain=0.1, questions=32, facts=32), 1, 80, 2e-4, topk=16),
)
