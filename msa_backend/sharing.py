"""Index scoring shared among tensor-parallel ranks: each scores a part of the blocks, for the index heads of all.

Every rank holds all index keys, but only its own heads' index queries: left alone, each rank reads all keys and scores
all blocks. Shared, the ranks gather each other's index queries, score every ``ranks``-th block each, gather the best
of all shares, and choose for their own heads. Two small exchanges a layer stand against a ``ranks``-th of the reading.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from msa_backend.config import MSAError
from msa_backend.kernels import api as kernels
from msa_backend.kernels.api import Batch, LayerCaches, Selection, Share
from msa_backend.kernels.batch import BLOCK_SIZE

SWITCH = "MSA_SHARED_SCORING"
"""From how many tokens of context on steps are scored in shares; unset or 0: none are."""


def least_tokens() -> int | None:
    """What the user set the switch to; None if scoring is not to be shared.

    Raises:
        MSAError: not a number of tokens.
    """
    given = os.environ.get(SWITCH, "")
    if not (given or "0").isdecimal():
        raise MSAError(
            f"{SWITCH} is {given!r}, but must be a whole number of tokens: steps with at least so long a context are "
            "scored in shares; leave it out and none are"
        )
    return int(given or "0") or None


@dataclass(frozen=True)
class SharedScoring:
    """How ranks share the scoring of blocks.

    Attributes:
        rank, ranks: of this process, and how many there are.
        replicas: ranks that hold the same index heads.
        least_tokens: steps whose longest context may have so many are shared. Every rank sees the same steps; of one
            that a CUDA graph records the longest context is the longest that the server takes.
        gather: ``x`` of every rank, as ``[ranks, *x.shape]``.
    """

    rank: int
    ranks: int
    replicas: int
    least_tokens: int
    gather: Callable[[Tensor], Tensor]

    def attend(
        self,
        q: Tensor,
        index_q: Tensor,
        caches: LayerCaches,
        batch: Batch,
        selection: Selection,
        scale: float,
        out: Tensor | None = None,
    ) -> Tensor:
        """As :func:`msa_backend.kernels.api.attend`, called by all ranks at once; shared where it pays."""
        if not self.pays(batch, selection):
            return kernels.attend(q, index_q, caches, batch, selection, scale, out)
        block_ids = self.select_blocks(index_q, caches, batch, selection)
        return kernels.sparse_attention(q, caches, block_ids, batch, scale, out)

    def pays(self, batch: Batch, selection: Selection) -> bool:
        """Whether the steps of a batch are shared, by its bounds alone."""
        return batch.max_seq_len >= max(self.least_tokens, selection.topk * BLOCK_SIZE + 1)

    def select_blocks(self, index_q: Tensor, caches: LayerCaches, batch: Batch, selection: Selection) -> Tensor:
        """As :func:`msa_backend.kernels.api.select_blocks`, called by all ranks at once.

        Args:
            index_q: ``[num_tokens, num_index_heads, index_dim]`` of this rank's index heads.
        """
        heads = index_q.shape[1]
        of_all = self.gather(index_q.contiguous())[:: self.replicas].transpose(0, 1).flatten(1, 2)
        share = Share(self.rank, self.ranks)
        candidates = self.gather(kernels.select_candidates(of_all, caches, batch, selection, share))
        first = self.rank // self.replicas * heads
        return kernels.merge_candidates(candidates[:, :, first : first + heads], batch, selection)
