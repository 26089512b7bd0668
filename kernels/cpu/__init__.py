"""The operations in plain vectorised torch: what CPU serving runs, and the fallback on any other device."""

from .attend import attend
from .dense_attention import dense_attention
from .norm_rope_write import norm_rope_write
from .select_blocks import select_blocks
from .sparse_attention import sparse_attention
from .write import write

__all__ = ["attend", "dense_attention", "norm_rope_write", "select_blocks", "sparse_attention", "write"]
