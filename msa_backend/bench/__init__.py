"""`msa-backend bench`: MSA beside the engines' own kernels and dense attention, checked and timed in one run."""

from msa_backend.bench.command import add_parser

__all__ = ["add_parser"]
