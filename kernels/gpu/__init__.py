"""The operations of :mod:`msa_backend.kernels.api` in Triton, for NVIDIA GPUs from SM80 up, tuned on SM90.

The host never waits for the device, and grids follow from shapes alone, so a CUDA graph may record every operation.
"""

from . import arch
from .attend import attend
from .norm_rope_write import norm_rope_write
from .select_blocks import merge_candidates, select_blocks, select_candidates
from .sparse_attention import sparse_attention
from .write import write

__all__ = [
    "arch", "attend", "merge_candidates", "norm_rope_write", "select_blocks", "select_candidates", "sparse_attention",
    "write",
]  # fmt: skip
