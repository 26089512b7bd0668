"""Which implementation runs on a device, and why; the only place that chooses."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch

from . import cpu

LEAST_CAPABILITY = (8, 0)


class Choice(NamedTuple):
    """An implementation, and the sentence about it for a log."""

    module: ModuleType
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
