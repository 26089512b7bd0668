"""Write the new tokens' keys, values and index keys into the paged cache."""

from __future__ import annotations

import torch
from torch import Tensor

from ..batch import BLOCK_SIZE


def write_cache(
    k: Tensor,
    v: Tensor,
    index_k: Tensor | None,
    k_pages: Tensor,
    v_pages: Tensor,
    index_k_pages: Tensor | None,
    slot_mapping: Tensor,
    *,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """See :func:`msa_backend.kernels.api.write_cache`."""
    (token,) = torch.where(slot_mapping >= 0)
    slot = slot_mapping[token].long()
    page, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE

    def write(new: Tensor, pages: Tensor, scale: float) -> None:
        new = _to_cache_dtype(new[token], pages.dtype, scale)
        if pages.element_size() == 1:  # fp8 has no index_put: move its bytes
            new, pages = new.view(torch.uint8), pages.view(torch.uint8)
        pages[page, offset] = new

    write(k, k_pages.transpose(1, 2), k_scale)
    write(v, v_pages.transpose(1, 2), v_scale)
    if index_k is not None and index_k_pages is not None:
        write(index_k, index_k_pages, 1.0)


def _to_cache_dtype(x: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    if dtype.itemsize > 1:
        return x.to(dtype)
    # A plain cast turns what does not fit into NaN (e4m3) or Inf (e5m2).
    limit = torch.finfo(dtype).max
    return (x.float() / scale).clamp(-limit, limit).to(dtype)
