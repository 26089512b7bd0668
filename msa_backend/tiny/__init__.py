"""A small MiniMax-M3 checkpoint with random weights, for trying and testing the plugin without the real one.

The answers of such a model are gibberish. What it is good for is everything but meaning: it loads wherever
MiniMax-M3 loads, and its logits move visibly whenever block selection is wrong. See `weights` for how.
"""

from msa_backend.tiny.checkpoint import DTYPES, FORMS, write_tiny_checkpoint
from msa_backend.tiny.command import add_parser
from msa_backend.tiny.errors import TinyCheckpointError
from msa_backend.tiny.quantize import QUANTIZATIONS
from msa_backend.tiny.shape import TinyShape

__all__ = [
    "DTYPES",
    "FORMS",
    "QUANTIZATIONS",
    "TinyCheckpointError",
    "TinyShape",
    "add_parser",
    "write_tiny_checkpoint",
]
