"""Programmatic dependent launch (Hopper): a kernel is brought up while the one before it still runs.

Of several short kernels in a row each start is hidden. Every kernel launched so waits before it reads or writes
anything, so kernels before that one are done too. Not for a kernel whose programs fill the chip exactly once: those
that come while the chip is busy settle where there is room, and some multiprocessors then have more work than others.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import arch


def available(device: torch.device) -> bool:
    """Pass it as ``launch_pdl`` to the launch, and to the kernel as a constant for the functions below."""
    return device.type != "cpu" and arch.capability(device) >= (9, 0)


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """The first statement of a kernel launched so."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """From here on the next kernel may be brought up."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
