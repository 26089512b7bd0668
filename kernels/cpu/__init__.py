"""The operations in plain vectorised torch: what CPU serving runs, and the fallback on any other device."""

from .attend import sparse_attention
from .cache import write_cache
from .norm_rope_write import norm_rope_write
from .select import select_blocks

__all__ = ["norm_rope_write", "select_blocks", "sparse_attention", "write_cache"]
