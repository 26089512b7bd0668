"""Which implementation runs on a device, and why; the only place that chooses."""

from __future__ import annotations

import importlib
from functools import cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from . import cpu
from .batch import Batch
from .caches import LayerCaches
from .norms import HeadNorms
from .selection import Selection
from .share import Share

LEAST_CAPABILITY = (8, 0)


class Operations(Protocol):
    """What an implementation has, with the signatures and contracts of :mod:`.api`."""

    def write(
        self, k: Tensor, v: Tensor, index_k: Tensor | None, caches: LayerCaches, slot_mapping: Tensor
    ) -> None: ...

    def norm_rope_write(
        self,
        projected: Tensor,
        positions: Tensor,
        norms: HeadNorms,
        caches: LayerCaches,
        slot_mapping: Tensor,
        *,
        index_q_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    def select_blocks(self, index_q: Tensor, caches: LayerCaches, batch: Batch, selection: Selection) -> Tensor: ...

    def select_candidates(
        self, index_q: Tensor, caches: LayerCaches, batch: Batch, selection: Selection, share: Share
    ) -> Tensor: ...

    def merge_candidates(self, candidates: Tensor, batch: Batch, selection: Selection) -> Tensor: ...

    def sparse_attention(
        self, q: Tensor, caches: LayerCaches, block_ids: Tensor, batch: Batch, scale: float, out: Tensor | None = None
    ) -> Tensor: ...

    def attend(
        self,
        q: Tensor,
        index_q: Tensor,
        caches: LayerCaches,
        batch: Batch,
        selection: Selection,
        scale: float,
        out: Tensor | None = None,
    ) -> Tensor: ...


class Choice(NamedTuple):
    """An implementation, and the sentence about it for a log."""

    module: Operations
    why: str

    @property
    def is_triton(self) -> bool:
        return self.module is not cpu


@cache
def choose(device: torch.device) -> Choice:
    """The module whose operations run on ``device``: ``kernels.gpu`` where it can run, else ``kernels.cpu``."""
    if device.type != "cuda":
        return Choice(cpu, f"Torch path: MSA's Triton kernels are for NVIDIA GPUs, and this is {device.type}.")
    name = torch.cuda.get_device_name(device)
    if torch.version.hip is not None:
        return Choice(
            cpu, f"Torch path, correct but slow: MSA's Triton kernels are not tried on AMD, and this is {name}."
        )
    try:
        gpu = importlib.import_module(".gpu", __package__)
    except ImportError as error:
        return Choice(cpu, f"Torch path, correct but slow: triton does not import ({error}); install triton.")
    major, minor = capability = gpu.arch.capability(device)
    if capability < LEAST_CAPABILITY:
        return Choice(
            cpu, f"Torch path, correct but slow: MSA's Triton kernels need SM80, and {name} is SM{major}{minor}."
        )
    return Choice(gpu, f"Triton kernels on {name}, SM{major}{minor}.")
