"""The operations of :mod:`msa_backend.kernels.api` in Triton, for NVIDIA GPUs from SM80 up, tuned on SM90.

The host never waits for the device, and grids follow from shapes alone, so a CUDA graph may record every operation.
"""

from . import arch
from .attend import attend
from .norm_rope_write import norm_rope_write
from .select_blocks import select_blocks
from .sparse_attention import sparse_attention
from .write import write

__all__ = ["arch", "attend", "norm_rope_write", "select_blocks", "sparse_attention", "write"]
