"""``msa-backend inspect MODEL``: which blocks a checkpoint selects, and how much of dense attention they hold."""

from .command import add_parser

__all__ = ["add_parser"]
