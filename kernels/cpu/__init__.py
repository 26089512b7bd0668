"""The operations in plain vectorised torch: what CPU serving runs, and the fallback on any other device."""

from .attend import attend
from .dense_attention import dense_attention
from .norm_rope_write import norm_rope_write
from .select_blocks import merge_candidates, select_blocks, select_candidates
from .sparse_attention import sparse_attention
from .write import write

__all__ = [
    "attend", "dense_attention", "merge_candidates", "norm_rope_write", "select_blocks", "select_candidates",
    "sparse_attention", "write",
]  # fmt: skip
