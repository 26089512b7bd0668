"""Text as tokens: what the tokenizer of the checkpoint makes of it, fast enough to write training data by."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import TYPE_CHECKING

from msa_backend.tiny.tokenizer import build_tokenizer

from .shape import NANO_WORDS

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@cache
def tokenizer() -> Tokenizer:
    return build_tokenizer(NANO_WORDS)


@lru_cache(maxsize=1 << 16)
def encode(text: str) -> tuple[int, ...]:
    """Pieces that begin with a space, a newline or a marker are encoded alike alone and in a text."""
    return tuple(tokenizer().encode(text, add_special_tokens=False).ids)


@cache
def _digits() -> tuple[int, ...]:
    return tuple(encode(digit)[0] for digit in "0123456789")


def encode_code(code: str) -> tuple[int, ...]:
    """A space and one token a digit; codes are too many to keep each."""
    digits = _digits()
    return (*encode(" "), *(digits[int(digit)] for digit in code))
