"""Select and attend: on a CPU one after the other."""

from __future__ import annotations

from torch import Tensor

from ..batch import Batch
from ..caches import LayerCaches
from ..selection import Selection
from .select_blocks import select_blocks
from .sparse_attention import sparse_attention


def attend(
    q: Tensor,
    index_q: Tensor,
    caches: LayerCaches,
    batch: Batch,
    selection: Selection,
    scale: float,
    out: Tensor | None = None,
) -> Tensor:
    """See :func:`msa_backend.kernels.api.attend`."""
    return sparse_attention(q, caches, select_blocks(index_q, caches, batch, selection), batch, scale, out)
