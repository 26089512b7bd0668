"""The definition in fp32, on a CPU: what the vectorised torch path is there beside."""

from __future__ import annotations

import torch

from msa_backend.bench.baselines.ours import bind_reference as bind

__all__ = ["bind", "unavailable"]


def unavailable(device: torch.device) -> str | None:
    return None if device.type == "cpu" else "the reference is timed on a CPU only"
