"""e4m3 keys read as int16, two channels each, and converted exactly by a few integer instructions.

The conversions that the hardware has go through fp16 at a sixteenth of the rate of other instructions: with them, fp8
keys took as long to score as bf16 keys of twice the size. A 16-bit load also lands in registers as the tensor cores
want it. Even and odd channels become operands of their own: a dot product may be added up in any order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def as_pairs(pages: Tensor | None) -> Tensor | None:
    """e4m3 ``pages`` seen as int16; None if they are of another dtype or at odd places."""
    if pages is None or pages.dtype != torch.float8_e4m3fn or pages.shape[-1] < 32:
        return None
    if any(n % 2 for n in (pages.storage_offset(), *pages.stride()[:-1])):
        return None
    return pages.view(torch.int16)


@triton.jit
def even_channels(pairs, dtype: tl.constexpr, PACKED: tl.constexpr):
    """The low numbers of pairs in bf16, fp16 or fp32, exactly but for NaN, which reads as 480.

    Their exponent and fraction are put into the lowest exponent bits of the wider format, and the difference of the
    biases is made up for by a product that is exact, of subnormal numbers too.
    """
    if PACKED and dtype == tl.bfloat16:
        wide = tl.inline_asm_elementwise(
            """{
            .reg .b32 sign, number, scale, zero;
            mov.b32 scale, 0x7b807b80;
            mov.b32 zero, 0x80008000;
            shl.b32 sign, $1, 8;
            and.b32 sign, sign, 0x80008000;
            shl.b32 number, $1, 4;
            and.b32 number, number, 0x07f007f0;
            or.b32 number, number, sign;
            fma.rn.bf16x2 $0, number, scale, zero;
            }""",
            "=r,r",
            [pairs],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    else:
        wide = odd_channels(pairs << 8, dtype, False)
    return wide


@triton.jit
def odd_channels(pairs, dtype: tl.constexpr, PACKED: tl.constexpr):
    """The high numbers of pairs, as :func:`even_channels` gives the low ones."""
    if PACKED and dtype == tl.bfloat16:
        wide = tl.inline_asm_elementwise(
            """{
            .reg .b32 sign, number, scale, zero;
            mov.b32 scale, 0x7b807b80;
            mov.b32 zero, 0x80008000;
            and.b32 sign, $1, 0x80008000;
            shr.b32 number, $1, 4;
            and.b32 number, number, 0x07f007f0;
            or.b32 number, number, sign;
            fma.rn.bf16x2 $0, number, scale, zero;
            }""",
            "=r,r",
            [pairs],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    elif dtype == tl.bfloat16:
        bits = (pairs & -0x8000) | ((pairs >> 4) & 0x07F0)
        wide = (bits.to(tl.bfloat16, bitcast=True).to(tl.float32) * 2.0**120).to(dtype)
    else:
        bits = (pairs & -0x8000) | ((pairs >> 1) & 0x3F80)
        wide = (bits.to(tl.float16, bitcast=True) * 256.0).to(dtype)
    return wide


PACKED = isinstance(even_channels, triton.JITFunction)
"""Whether numbers may be converted two at a time by instructions; not under the interpreter."""
