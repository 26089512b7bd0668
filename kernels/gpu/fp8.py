"""FP8 caches read into the dtype of the products, exactly, whether or not the device knows the format."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import arch

E4M3_CAPABILITY = (8, 9)
"""Triton has e4m3 from here up."""


def loadable(pages: Tensor) -> Tensor:
    """``pages`` as a kernel can load them: e4m3 as bytes on a device that lacks the type. Pass on to :func:`widen`."""
    if pages.dtype == torch.float8_e4m3fn and arch.capability(pages.device) < E4M3_CAPABILITY:
        return pages.view(torch.uint8)
    return pages


@triton.jit
def widen(x, dtype: tl.constexpr):
    """``x`` in a dtype that holds all its values; bytes are e4m3 numbers."""
    if x.dtype == tl.uint8:
        # Exponent and fraction fit fp16's below its larger bias: 2**8 too small, subnormals included.
        bits = x.to(tl.uint16)
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        value = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        x = tl.where((bits & 0x7F) == 0x7F, float("nan"), value)
    return x.to(dtype)
