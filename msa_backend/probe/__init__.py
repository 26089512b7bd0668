"""``msa-backend probe URL``: does a server find what stands anywhere in a long prompt?"""

from .command import add_parser

__all__ = ["add_parser"]
