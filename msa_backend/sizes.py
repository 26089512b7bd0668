"""Numbers of tokens as people write them on a command line."""

from __future__ import annotations

import argparse


def size(text: str) -> int:
    """4096, 8K or 1M.

    Raises:
        argparse.ArgumentTypeError: it is none of these, or less than 1.
    """
    scale = {"K": 2**10, "M": 2**20}.get(text[-1:].upper())
    try:
        found = int(text[:-1]) * scale if scale else int(text)
    except ValueError:
        found = 0
    if found < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens; write such as 4096, 8K or 1M")
    return found


def sizes(text: str) -> list[int]:
    """Several, with commas between them."""
    return [size(part) for part in text.split(",")]
