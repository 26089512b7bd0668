"""The tokens that are read, and where in them the target stands."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any, NamedTuple

from msa_backend.probe.tasks import Place, needle

from .errors import InspectError

NEEDLE_TOKENS = 8192
TRIES = 8
"""To make a prompt of a given length without knowing how many tokens a word has."""
FEW_WORDS = 5
"""About half a sentence."""


class Prompt(NamedTuple):
    """
    Attributes:
        ids: of the tokens.
        target: its first token and the one after its last; None for none.
    """

    ids: list[int]
    target: tuple[int, int] | None


def load_tokenizer(model: Path) -> Any:
    """
    Raises:
        InspectError: the checkpoint has none.
    """
    try:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(model, local_files_only=True)
    except (ImportError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InspectError(f"{model} has no tokenizer that loads ({reason}); put its tokenizer.json there") from None


def of_text(tokenizer: Any, text: str, target: str | None, length: int | None) -> Prompt:
    """The first ``length`` tokens of ``text``, all if None.

    Raises:
        InspectError: the target does not stand in them.
    """
    found = tokenizer(text, return_offsets_mapping=target is not None)
    ids = found["input_ids"][:length]
    if target is None:
        return Prompt(ids, None)
    begin = text.find(target)
    end = begin + len(target)
    within = [i for i, (first, last) in enumerate(found["offset_mapping"]) if first < end and last > begin]
    if begin < 0 or not target or within[-1] >= len(ids):
        raise InspectError(
            f"--target {target!r} does not stand in the {len(ids):,} tokens of the prompt; copy a part of it literally"
        )
    return Prompt(ids, (within[0], within[-1] + 1))


def of_needle(tokenizer: Any, length: int | None, depth: float, seed: int) -> Prompt:
    """A prompt as ``msa-backend probe`` asks, of ``length`` tokens or a few less, whose target is the fact."""
    wanted = length or NEEDLE_TOKENS
    words = wanted // 8
    for _ in range(TRIES):
        task = needle(random.Random(seed), Place(words, depth))
        fact = re.search(rf"The access code of [^.]*{task.codes[0]}\.", task.text)
        assert fact is not None, "the fact stands in its text"
        prompt = of_text(tokenizer, task.text, fact[0], None)
        over = len(prompt.ids) - wanted
        if -max(64, wanted // 50) <= over <= 0:
            break
        # Sentences stay whole, so aim a little below.
        words = max(0, words - over * words // len(prompt.ids) - FEW_WORDS)
    return prompt
