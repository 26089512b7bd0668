"""What the card does at best, measured at the start of each run: datasheets are leads, and cards differ."""

from __future__ import annotations

from functools import partial

import torch

from msa_backend.bench.counts import Rates
from msa_backend.bench.inputs import DTYPES
from msa_backend.bench.timing import Clock


def measure(device: torch.device, dtype: str, clock: Clock) -> Rates:
    """Rates of reading, copying and multiplying, on random numbers: zeros multiply faster than anything real."""
    on_cpu = device.type == "cpu"
    size, side = (2**24, 512) if on_cpu else (2**32, 8192)

    read, copy = _bandwidth(size, device, clock)
    flop = 2 * side**3
    a, b = (torch.randn(side, side, device=device).to(DTYPES[dtype]) for _ in range(2))
    flops = flop / clock.median([lambda: a @ b], in_graph=False)
    fp8_flops = flops
    if not on_cpu and torch.cuda.get_device_capability(device) >= (8, 9):
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).T
        one = torch.ones((), device=device)

        def product() -> object:
            return torch._scaled_mm(a8, b8, one, one, out_dtype=torch.bfloat16)

        fp8_flops = flop / clock.median([product], in_graph=False)
    return Rates(bandwidth=max(read, copy), copy=copy, flops=flops, fp8_flops=fp8_flops)


def _bandwidth(size: int, device: torch.device, clock: Clock) -> tuple[float, float]:
    source = torch.empty(size // 4, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    # None of these was written to measure bandwidth, so the fastest of them counts.
    reductions = (source.sum, source.amax, source.view(torch.float64).amax, partial(source.view(-1, 2**12).sum, 1))
    read = min(clock.median([reduction], in_graph=False) for reduction in reductions)
    copy = clock.median([lambda: target.copy_(source)], in_graph=False)
    return size / read, 2 * size / copy
