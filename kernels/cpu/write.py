"""Write the new tokens' keys, values and index keys into the paged cache."""

from __future__ import annotations

import torch
from torch import Tensor

from ..batch import BLOCK_SIZE
from ..caches import LayerCaches


def write(k: Tensor, v: Tensor, index_k: Tensor | None, caches: LayerCaches, slot_mapping: Tensor) -> None:
    """See :func:`msa_backend.kernels.api.write`."""
    (token,) = torch.where(slot_mapping >= 0)
    slot = slot_mapping[token].long()
    page, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE

    def put(new: Tensor, pages: Tensor, scale: float) -> None:
        new = _to_cache_dtype(new[token], pages.dtype, scale)
        if pages.element_size() == 1:  # fp8 has no index_put: move its bytes
            new, pages = new.view(torch.uint8), pages.view(torch.uint8)
        pages[page, offset] = new

    put(k, caches.k_pages.transpose(1, 2), caches.k_scale)
    put(v, caches.v_pages.transpose(1, 2), caches.v_scale)
    if index_k is not None and caches.index_k_pages is not None:
        put(index_k, caches.index_k_pages, 1.0)


def _to_cache_dtype(x: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    if dtype.itemsize > 1:
        return x.to(dtype)
    # A plain cast turns what does not fit into NaN (e4m3) or Inf (e5m2).
    limit = torch.finfo(dtype).max
    return (x.float() / scale).clamp(-limit, limit).to(dtype)
