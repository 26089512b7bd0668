"""What the GPU at hand is: the only place that asks the driver, so that a test can stand in for any GPU.

Call these as ``arch.capability(device)``, not by an imported name, or the stand-in is not seen. Without CUDA (under
Triton's interpreter) they answer for an H200, whose choices are the ones to exercise.
"""

from __future__ import annotations

from functools import cache

import torch


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """``(9, 0)`` for SM90."""
    if device.type != "cuda":
        return 9, 0
    major, minor = torch.cuda.get_device_capability(device)
    return major, minor


def recording(device: torch.device) -> bool:
    """Whether a CUDA graph is being recorded: nothing runs, and what is launched will run at every replay."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@cache
def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors, for grids that should fill the chip once."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count
