"""Tensor-parallel ranks share the heads and the experts' width, and answer as one.

A checkpoint in the form of ``transformers`` is split over two ranks in ``test_equal.py``.
"""

from __future__ import annotations

from pathlib import Path

from ..prompts import LENGTHS, NEW_TOKENS, PROMPTS
from .capabilities import Can, needs
from .conftest import Right
from .drivers import DRIVER

SOME = [PROMPTS[LENGTHS.index(length)] for length in (17, 257, 640, 1300)]


@needs(Can.TENSOR_PARALLEL)
def test_two_ranks(tiny: Path, right: Right):
    """One KV head and one index head each; prompts in chunks, with running requests among them.

    In processes of their own, as a server has them, with one more for the engine's core.
    """
    with DRIVER.engine(tiny, apart=True, ranks=2, chunk=256, mixed=True) as engine:
        answers = engine.ask(SOME, NEW_TOKENS, prompt_logprobs=True)
    right(answers, SOME)
