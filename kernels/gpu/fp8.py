"""FP8 caches: read into the dtype of the products exactly, and written, whether or not the GPU knows the format."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import arch

E4M3_CAPABILITY = (8, 9)
"""Triton has e4m3 from here up."""
MANTISSA_BITS = {torch.float8_e4m3fn: 3, torch.float8_e5m2: 2}


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


def storable(x: Tensor) -> tuple[Tensor, int]:
    """What a kernel stores into for ``x``, and the ``MANTISSA`` it passes to :func:`to_cache`: bytes and 3 or 2 for
    fp8, ``x`` itself and 0 for wider dtypes."""
    mantissa = MANTISSA_BITS.get(x.dtype, 0)
    return (x.view(torch.uint8) if mantissa else x), mantissa


@triton.jit
def to_cache(x, scale, MANTISSA: tl.constexpr):
    """Values for wide pages as they are; for fp8, divided by the scale, saturated, rounded to nearest even, as bytes.

    By integer arithmetic, because SM80 converts nothing to e4m3. NaN stays NaN.
    """
    if MANTISSA == 0:
        stored = x
    else:
        stored = _encode(tl.div_rn(x.to(tl.float32), scale), MANTISSA)
    return stored


@triton.jit
def _encode(x, MANTISSA: tl.constexpr):
    BIAS: tl.constexpr = 7 if MANTISSA == 3 else 15
    LIMIT: tl.constexpr = 448.0 if MANTISSA == 3 else 57344.0
    bits = x.to(tl.int32, bitcast=True)
    magnitude = tl.minimum(tl.abs(x), LIMIT)
    wide = magnitude.to(tl.int32, bitcast=True)

    drop: tl.constexpr = 23 - MANTISSA
    half: tl.constexpr = (1 << (drop - 1)) - 1
    normal = ((wide + half + ((wide >> drop) & 1)) >> drop) - ((127 - BIAS) << MANTISSA)
    # Added to a power of two whose last place is fp8's smallest step, the number is rounded to that step.
    step_exponent: tl.constexpr = 127 + 1 - BIAS - MANTISSA + 23
    step_bits: tl.constexpr = step_exponent << 23
    step = tl.full((), step_bits, tl.int32).to(tl.float32, bitcast=True)
    subnormal = (magnitude + step).to(tl.int32, bitcast=True) - step_bits
    code = tl.where(wide < (127 + 1 - BIAS) << 23, subnormal, normal)
    code = tl.where(x != x, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)
