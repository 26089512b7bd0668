"""Integer arithmetic for grids. Triton's own host functions of these names take 4 us a call, as long as a kernel."""

from __future__ import annotations


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
