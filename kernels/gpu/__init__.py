"""The operations of :mod:`msa_backend.kernels.api` in Triton, for NVIDIA GPUs from SM80 up, tuned on SM90.

The host never waits for the device, and grids follow from shapes alone, so a CUDA graph may record every operation.
"""

from . import arch
from .norm_rope_write import norm_rope_write
from .write import write_cache

__all__ = ["arch", "norm_rope_write", "write_cache"]
