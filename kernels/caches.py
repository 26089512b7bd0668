"""The caches of one layer, checked once when an engine binds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from .batch import BLOCK_SIZE

COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class LayerCaches:
    """Paged keys, values and index keys. All are views with any strides but 1 on the last axis.

    Attributes:
        k_pages, v_pages: ``[num_pages, num_kv_heads, 128, head_dim]`` fp16, bf16, fp32 or fp8.
        index_k_pages: ``[num_pages, 128, index_dim]``, same dtypes, fp8 with a scale of 1; None for a dense layer.
        k_scale, v_scale: what fp8 keys and values are multiplied by when read; 1 for wider dtypes.
        kept: what an implementation works out of pages that never move, once.

    Raises:
        ValueError: shapes, strides, dtypes or scales that do not fit together.
    """

    k_pages: Tensor
    v_pages: Tensor
    index_k_pages: Tensor | None = None
    k_scale: float = 1.0
    v_scale: float = 1.0
    kept: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name, pages, scale in (("k", self.k_pages, self.k_scale), ("v", self.v_pages, self.v_scale)):
            if pages.dim() != 4 or pages.shape[2] != BLOCK_SIZE:
                raise ValueError(
                    f"{name}_pages has shape {tuple(pages.shape)}, but must be (num_pages, num_kv_heads, {BLOCK_SIZE}, "
                    f"head_dim); start the engine with KV pages (blocks) of {BLOCK_SIZE} tokens"
                )
            _check_pages(f"{name}_pages", pages)
            if scale != 1.0 and pages.dtype not in FP8_DTYPES:
                raise ValueError(
                    f"{name}_scale is {scale}, but {name}_pages is {pages.dtype} and only fp8 is scaled; pass 1.0"
                )
        if self.k_pages.shape != self.v_pages.shape or self.k_pages.dtype != self.v_pages.dtype:
            raise ValueError(
                f"k_pages is {self.k_pages.dtype} of shape {tuple(self.k_pages.shape)} and v_pages "
                f"{self.v_pages.dtype} of {tuple(self.v_pages.shape)}, but both must be the same; pass the two halves "
                "of one cache"
            )
        index = self.index_k_pages
        if index is None:
            return
        if index.dim() != 3 or index.shape[:2] != (self.num_pages, BLOCK_SIZE):
            raise ValueError(
                f"index_k_pages has shape {tuple(index.shape)}, but must be ({self.num_pages}, {BLOCK_SIZE}, "
                f"index_dim), one for each of k_pages; start the engine with KV pages (blocks) of {BLOCK_SIZE} tokens"
            )
        _check_pages("index_k_pages", index)

    @property
    def num_pages(self) -> int:
        return self.k_pages.shape[0]

    @property
    def num_kv_heads(self) -> int:
        return self.k_pages.shape[1]

    @property
    def head_dim(self) -> int:
        return self.k_pages.shape[3]

    @property
    def index_dim(self) -> int:
        """Channels of an index key; 0 for a dense layer."""
        return 0 if self.index_k_pages is None else self.index_k_pages.shape[2]

    def keep(self, make: Callable[[LayerCaches], T]) -> T:
        """``make(self)``, made once."""
        if make not in self.kept:
            self.kept[make] = make(self)
        return self.kept[make]


def _check_pages(name: str, pages: Tensor) -> None:
    allowed = COMPUTE_DTYPES + FP8_DTYPES
    if pages.dtype not in allowed:
        raise ValueError(f"{name} is {pages.dtype}, but must be one of {', '.join(map(str, allowed))}; convert it")
    if pages.stride(-1) != 1:
        raise ValueError(
            f"{name} has stride {pages.stride(-1)} on its last axis, but vectors must be contiguous (stride 1); "
            "permute other axes only"
        )
