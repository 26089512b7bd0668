"""A layer's caches as kernels take them."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ..caches import LayerCaches
from . import fp8, tma
from .pairs import as_pairs

STRIDE_UNIT = 16
"""Elements. Kernels are given strides in this unit: so a compiler knows that loads are aligned, and one compiled
kernel serves all strides."""
LOG2_E = math.log2(math.e)


class Pages:
    """Views, strides and tensor descriptors, made once when caches are bound.

    Attributes:
        k, v, index_k: the pages as kernels load them; e4m3 as bytes on a GPU that lacks the type.
        kv_strides: of page, head and token of ``k``, then of ``v``, in units of 16 elements.
        index_strides: of page and token of ``index_k``, likewise.
        v_scale: of ``v``.
        index_pairs: ``index_k`` as :mod:`.pairs` reads it, or None.
        k_desc, v_desc, index_k_desc: for bulk copies of a page and head, or None where the GPU has none.
        exchanged: all of these tensors and descriptors.
        layout: all else but scales: caches of the same take the same launches.
    """

    def __init__(self, caches: LayerCaches) -> None:
        self.num_pages = caches.num_pages
        self.num_kv_heads = caches.num_kv_heads
        self.k, self.v = fp8.loadable(caches.k_pages), fp8.loadable(caches.v_pages)
        self.kv_strides = (
            *units("k_pages", caches.k_pages.stride()[:3]),
            *units("v_pages", caches.v_pages.stride()[:3]),
        )
        # A product is an object of its own, by which launches tell a layer's scale from any other number.
        self.v_scale = caches.v_scale * 1.0
        self._k_scale, self._logit_scales = caches.k_scale, dict[float, float]()
        self.k_desc, self.v_desc = _descriptor(self.k), _descriptor(self.v)
        self.exchanged: list[Any] = [self.k, self.v, self.k_desc, self.v_desc]
        self.layout: tuple[Any, ...] = (
            self.num_pages, self.num_kv_heads, caches.head_dim, caches.k_pages.dtype, self.kv_strides,
        )  # fmt: skip
        if caches.index_k_pages is not None:
            self.index_k: Tensor = fp8.loadable(caches.index_k_pages)
            self.index_strides = units("index_k_pages", caches.index_k_pages.stride()[:2])
            self.index_pairs = as_pairs(caches.index_k_pages)
            self.index_k_desc = _descriptor(self.index_k)
            self.exchanged += [self.index_k, self.index_pairs, self.index_k_desc]
            self.layout += caches.index_dim, caches.index_k_pages.dtype, self.index_strides

    def logit_scale(self, scale: float) -> float:
        """What a product of a query and a stored key is multiplied by for a base-2 logit, given the attention's scale;
        the same object each time."""
        if scale not in self._logit_scales:
            self._logit_scales[scale] = scale * self._k_scale * LOG2_E
        return self._logit_scales[scale]


def _descriptor(pages: Tensor) -> Any | None:
    return tma.descriptor(pages, [1] * (pages.dim() - 2) + list(pages.shape[-2:]))


def units(name: str, strides: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in units of 16 elements.

    Raises:
        ValueError: one is no multiple of 16.
    """
    if any(stride % STRIDE_UNIT for stride in strides):
        raise ValueError(
            f"{name} has the strides {strides} before its last axis, but the GPU kernels need multiples of "
            f"{STRIDE_UNIT} elements; allocate it so"
        )
    return tuple(stride // STRIDE_UNIT for stride in strides)


DIMS = (16, 32, 64, 128)


def check_dim(name: str, dim: int) -> None:
    """Refuse a head size that no kernel takes.

    Raises:
        ValueError: it is none of 16, 32, 64, 128.
    """
    if dim not in DIMS:
        raise ValueError(f"{name} is {dim}, but the GPU kernels take {', '.join(map(str, DIMS))}; run on the CPU")
