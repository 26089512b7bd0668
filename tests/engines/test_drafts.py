"""Draft tokens found by n-gram look-up in the prompt make rows of several decode tokens."""

from __future__ import annotations

from pathlib import Path

from ..prompts import MANY, MANY_TOKENS
from .capabilities import Can, needs
from .conftest import Right
from .drivers import DRIVER


@needs(Can.DRAFTS)
def test_drafts_to_verify(tiny: Path, right: Right):
    # Apart: in this process the look-up of n-grams, by numba, took more than twice the CPU of all processes together.
    with DRIVER.engine(tiny, apart=True, drafts=3, prefix_caching=True, chunk=512) as engine:
        answers = engine.ask(MANY, MANY_TOKENS)
        assert engine.drafted() > 0
    right(answers, MANY)
