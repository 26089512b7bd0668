"""Launch Triton kernels by compiled handles that are kept.

Triton's own dispatch works out at every launch which compiled form fits the arguments: 9 to 16 us of host time, more
than these kernels often run for. Here the form follows from constants and dtypes alone, and is looked up by them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

ALIGNMENT = 16
"""Bytes: where tensors begin, so that a thread loads as many at a time."""


class Options(NamedTuple):
    """How a kernel is compiled and launched.

    Attributes:
        num_warps: of a thread block.
        num_stages: of the loads of a loop that are in flight.
        pdl: whether it may be brought up while the kernel before it still runs; see :mod:`.pdl`.
    """

    num_warps: int = 4
    num_stages: int = 3
    pdl: bool = False


class Kernel:
    """A Triton kernel whose scalars and unaligned tensors are not specialised on.

    ``kernel(grid, arguments, constants, options)`` launches it; both tuples are in the order of its signature, in
    which constants come last, tensors are called ``*_ptr`` and tensor descriptors ``*_desc``.
    """

    def __init__(self, function: Callable[..., Any], unaligned: tuple[str, ...]) -> None:
        parameters = inspect.signature(function).parameters.values()
        names = [p.name for p in parameters if "constexpr" not in str(p.annotation)]
        scalars = [name for name in names if not name.endswith(("_ptr", "_desc"))]
        self.function = triton.jit(function, do_not_specialize=[*scalars, *unaligned])
        self._must_align = [name not in unaligned for name in names]
        self._compiled: dict[Any, Any] = {}

    def __call__(
        self, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: tuple[Any, ...], options: Options
    ) -> None:
        passed, dtypes, keep = [], [], True
        for x, must_align in zip(arguments, self._must_align, strict=True):
            if isinstance(x, Tensor):
                pointer = x.data_ptr()
                keep &= not (must_align and pointer % ALIGNMENT)
                passed.append(pointer)
                dtypes.append(x.dtype)
            else:
                passed.append(x)
        key = arguments[0].device, *dtypes, *constants, options
        if keep and (compiled := self._compiled.get(key)) is not None:
            x, y, z = (*grid, 1, 1)[:3]
            compiled[x, y, z](*passed, *constants)
            return
        pdl = {"launch_pdl": True} if options.pdl else {}
        compiled = self.function[grid](
            *arguments, *constants, num_warps=options.num_warps, num_stages=options.num_stages, **pdl
        )
        if keep and KEEP_HANDLES and compiled is not None:
            self._compiled[key] = compiled


KEEP_HANDLES = not triton.knobs.runtime.interpret
"""A test that only compiles must not launch by what it compiled."""


def kernel(*, unaligned: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Kernel]:
    """Make a function a :class:`Kernel`.

    Args:
        unaligned: tensors that may begin anywhere, such as slices of an engine's buffers.
    """
    return lambda function: Kernel(function, unaligned)


__all__ = ["ALIGNMENT", "JITFunction", "Kernel", "Options", "kernel"]
