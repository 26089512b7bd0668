"""The operations in plain vectorised torch: what CPU serving runs, and the fallback on any other device."""

from .attend import sparse_attention
from .cache import write_cache
from .select import select_blocks

__all__ = ["select_blocks", "sparse_attention", "write_cache"]
