"""The engine with our model and kernels computes what ``transformers`` computes, on prompts of 1 to 6,000 tokens.

Whole, in chunks and behind prefixes from the cache; together and alone; from each form of the same checkpoint. Every
engine is held against the same truth, so two that pass agree with each other. What costs time is starting an engine,
so each is asked all that it can show, and is gone before its answers are looked at.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from ..compare import Answer, assert_true
from ..prompts import BLOCKS, BRANCH, FIRST, LENGTHS, LONG, LONG_ANSWERS, LONGER, NEW_TOKENS, PROMPTS
from .capabilities import Can, needs
from .conftest import Right
from .drivers import DRIVER

SHORT = slice(0, 17)
# One after the other: what of each is in the cache by then, in whole pages.
ONE_BY_ONE = [(FIRST, 0), (FIRST, 1280), (BRANCH, 896), (LONGER, 1280), (BLOCKS, 0), (BLOCKS, 896), (FIRST, 1280)]
TOGETHER = [BRANCH, LONGER, BLOCKS, FIRST]

pytestmark = needs(Can.SERVE_TEXT, Can.EQUAL_TRANSFORMERS)


class Plain(NamedTuple):
    """Answers to prompts that are each computed in one step."""

    whole: list[Answer]
    alone: list[Answer]
    long: list[Answer]


class Chunked(NamedTuple):
    """Answers to the same prompts in chunks, and to prompts whose beginning is in the cache."""

    whole: list[Answer]
    one_by_one: list[Answer]
    together: list[Answer]


@pytest.fixture(scope="module")
def plain(tiny: Any) -> Plain:
    """From an engine in processes of its own, as a server has them."""
    with DRIVER.engine(tiny, apart=True) as engine:
        return Plain(
            engine.ask(PROMPTS, NEW_TOKENS, prompt_logprobs=True),
            [answer for prompt in PROMPTS[SHORT] for answer in engine.ask([prompt], NEW_TOKENS)],
            engine.ask(LONG_ANSWERS, LONG),
        )


@needs(Can.FP32)
@pytest.mark.parametrize("at", range(len(PROMPTS)), ids=[f"{length} tokens" for length in LENGTHS])
def test_whole(plain: Plain, truth: Any, at: int):
    assert len(plain.whole[at].prompt_logprobs) == LENGTHS[at] - 1
    assert len(plain.whole[at].tokens) == NEW_TOKENS
    assert_true(plain.whole[at], PROMPTS[at], truth)


@needs(Can.FP32)
@pytest.mark.parametrize("at", range(len(LONG_ANSWERS)))
def test_long_answers(plain: Plain, truth: Any, at: int):
    assert len(plain.long[at].tokens) == LONG
    assert_true(plain.long[at], LONG_ANSWERS[at], truth)


def test_answers_do_not_repeat(plain: Plain):
    """Equal answers prove little if a model says the same whatever it reads."""
    said = [token for answer in plain.whole for token in answer.tokens]
    assert len(set(said)) > len(said) / 4
    assert all(len(set(answer.tokens)) > NEW_TOKENS / 2 for answer in plain.whole)


def test_alone(plain: Plain, right: Right):
    right(plain.alone, PROMPTS[SHORT])


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((128, "native", 1), id="128"),
        pytest.param((192, "tiny", 1), id="192", marks=needs(Can.ANY_CHUNK)),
        pytest.param((2048, "default", 2), id="2048 on two ranks", marks=needs(Can.TENSOR_PARALLEL)),
    ],
)
def chunked(request: pytest.FixtureRequest) -> Chunked:
    chunk, form, ranks = request.param
    model = request.getfixturevalue(form)
    with DRIVER.engine(model, chunk=chunk, ranks=ranks, prefix_caching=True, pages=512) as engine:
        return Chunked(
            engine.ask(PROMPTS, NEW_TOKENS, prompt_logprobs=True),
            [answer for prompt, _ in ONE_BY_ONE for answer in engine.ask([prompt], NEW_TOKENS)],
            engine.ask(TOGETHER, NEW_TOKENS),
        )


@needs(Can.PREFIX_CACHING, Can.WEIGHT_FORMS)
def test_chunked(chunked: Chunked, right: Right):
    right(chunked.whole, PROMPTS)


@needs(Can.PREFIX_CACHING)
def test_prefix_hits(chunked: Chunked, right: Right):
    assert [answer.cached for answer in chunked.one_by_one] == [cached for _, cached in ONE_BY_ONE]
    right(chunked.one_by_one, [prompt for prompt, _ in ONE_BY_ONE])


@needs(Can.PREFIX_CACHING)
def test_prefix_hits_together(chunked: Chunked, right: Right):
    assert all(answer.cached >= 896 for answer in chunked.together)
    right(chunked.together, TOGETHER)


@needs(Can.WEIGHT_FORMS)
def test_text_only_in_chunks_without_a_prefix_cache(text_only: Any, right: Right):
    with DRIVER.engine(text_only, chunk=640) as engine:
        answers = engine.ask(PROMPTS, NEW_TOKENS, prompt_logprobs=True)
    right(answers, PROMPTS)
