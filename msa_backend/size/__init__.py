"""``msa-backend size``: what MiniMax-M3 takes and costs, computed before any GPU is rented."""

from .command import add_parser

__all__ = ["add_parser"]
