"""Prompts of random words, the same for the same key in every process."""

from __future__ import annotations

import functools
import random

# The tiny tokenizer's first 256 tokens are bytes; words follow, more than these.
WORDS = range(256, 1000)
BLOCK = 128  # tokens: both engines keep and find prefixes in whole pages


def tokens(length: int, *key: object) -> list[int]:
    """`length` token ids; another key, other tokens."""
    return random.Random(repr(key)).choices(WORDS, k=length)


@functools.lru_cache(maxsize=8)  # half a million words take longer to draw than to be answered after a hit
def context(length: int, seed: int) -> list[int]:
    """The `seed`-th prompt of `length` tokens; not to be changed."""
    return tokens(length, "context", length, seed)


def after_hit(length: int, seed: int, new: int, *key: object) -> list[int]:
    """A prompt whose first tokens are those of `context(length, seed)`, as far as it is kept, and `new` tokens."""
    return context(length, seed)[: kept(length)] + tokens(new, "suffix", length, *key)


def kept(length: int) -> int:
    """How many tokens of a prompt a later one finds in the prefix cache."""
    return length // BLOCK * BLOCK
