"""What the layers of a step share: memory that they use one after the other, and what was worked out for all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..batch import Batch
from . import arch


class Workspace:
    """Memory that lasts. What a layer leaves in it means nothing to the next, but for zeros asked for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}

    def hold(self, name: str, size: int, dtype: torch.dtype, *, zeroed: bool = False) -> Tensor:
        """Memory for ``size`` elements, the same for every caller of that name.

        Args:
            zeroed: it is zeros at first, and whoever uses it leaves zeros behind.
        """
        held = self._held.get((name, dtype))
        if held is None or held.numel() < size:
            make = torch.zeros if zeroed else torch.empty
            held = self._held[name, dtype] = make(size, dtype=dtype, device=self._device)
        return held[:size]


_OF_STREAM: dict[tuple[torch.device, int], Workspace] = {}
"""One for each stream, on which steps run one after the other."""


def kept_of(batch: Batch) -> dict[Any, Any]:
    """What was worked out of a batch for all layers of its step.

    Nothing that was worked out before a CUDA graph is recorded: the graph has to hold the working out, too.
    """
    if arch.recording(batch.seq_lens.device):
        return batch.kept.setdefault("recorded", {})
    return batch.kept


def workspace_of(batch: Batch) -> Workspace:
    """The memory of a step: of its stream, or of the CUDA graph that is being recorded alone.

    A graph is replayed with the addresses that it was recorded with, while a stream's memory moves when it grows.
    """
    kept = kept_of(batch)
    if Workspace not in kept:
        device = batch.seq_lens.device
        if device.type != "cuda" or arch.recording(device):
            kept[Workspace] = Workspace(device)
        else:
            key = device, torch.cuda.current_stream(device).cuda_stream
            kept[Workspace] = _OF_STREAM.setdefault(key, Workspace(device))
    return kept[Workspace]


def share_workspace(batch: Batch, piece: Batch) -> None:
    """Let a piece of a step, which runs before or after its other pieces, use the same memory."""
    kept_of(piece)[Workspace] = workspace_of(batch)
