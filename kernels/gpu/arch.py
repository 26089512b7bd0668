"""What the kernels ask of the device: its architecture and its size."""

from __future__ import annotations

from functools import cache

import torch


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability as (major, minor). Without a GPU, under Triton's interpreter, that of Hopper."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of the device; without a GPU a small number, so that work is still split."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
