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


def as_pairs(pages: Tensor) -> Tensor | None:
    """e4m3 ``pages`` seen as int16, two neighbouring channels each, for :func:`even_channels` and :func:`odd_channels`.

    None if they are of another dtype or at odd places.
    """
    if pages.dtype != torch.float8_e4m3fn or pages.shape[-1] % 2 or any(stride % 2 for stride in pages.stride()[:-1]):
        return None
    if pages.storage_offset() % 2:
        return None
    return pages.view(torch.int16)


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


@triton.jit
def even_channels(pairs, dtype: tl.constexpr, PACKED: tl.constexpr):
    """The low e4m3 numbers of int16 pairs in bf16, fp16 or fp32, exactly but for NaN, which reads as 480."""
    return _high_byte(pairs << 8, dtype, PACKED)


@triton.jit
def odd_channels(pairs, dtype: tl.constexpr, PACKED: tl.constexpr):
    """The high e4m3 numbers of int16 pairs, as :func:`even_channels`."""
    return _high_byte(pairs, dtype, PACKED)


@triton.jit
def _high_byte(x, dtype: tl.constexpr, PACKED: tl.constexpr):
    """e4m3 numbers in the high bytes of int16. Their exponent and fraction are put in the lowest exponent bits of the
    wider format, and the difference of the two biases is made up for by a product that is exact."""
    if dtype == tl.bfloat16:
        if PACKED:
            return tl.inline_asm_elementwise(
                """{
                .reg .b32 sign, number;
                .reg .b32 scale, zero;
                mov.b32 scale, 0x7b807b80;
                mov.b32 zero, 0x80008000;
                and.b32 sign, $1, 0x80008000;
                shr.b32 number, $1, 4;
                and.b32 number, number, 0x07f007f0;
                or.b32 number, number, sign;
                fma.rn.bf16x2 $0, number, scale, zero;
                }""",
                "=r,r",
                [x],
                dtype=tl.bfloat16,
                is_pure=True,
                pack=2,
            )
        wide = (x & -0x8000) | ((x >> 4) & 0x07F0)
        return (wide.to(tl.bfloat16, bitcast=True).to(tl.float32) * 2.0**120).to(tl.bfloat16)
    wide = (x & -0x8000) | ((x >> 1) & 0x3F80)
    return (wide.to(tl.float16, bitcast=True) * 256.0).to(dtype)


PACKED = isinstance(_high_byte, triton.JITFunction)
"""Whether numbers may be converted two at a time by instructions; not under the interpreter."""
