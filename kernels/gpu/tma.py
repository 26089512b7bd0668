"""Hopper's bulk copies: a block of keys or values moves to shared memory by one instruction, and needs no registers."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import arch

ALIGNMENT = 16
"""Bytes: of the first element, and of every stride but the last."""


def descriptor(x: Tensor, block: list[int]) -> Any | None:
    """Describe ``x`` for copies of ``block`` elements; None where the GPU or the layout of ``x`` does not allow it."""
    if x.device.type == "cpu" or arch.capability(x.device)[0] < 9:
        return None
    if (x.storage_offset() * x.element_size()) % ALIGNMENT or x.stride(-1) != 1 or not x.numel():
        return None
    if any(stride * x.element_size() % ALIGNMENT for stride in x.stride()[:-1]):
        return None
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)
