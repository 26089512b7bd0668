"""SGLang with our model and kernels computes what ``transformers`` computes, on prompts of 1 to 6,000 tokens.

The prompts are those that vLLM is tested with, and so is the truth: two engines that both agree with it within the
tolerance agree with each other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from .. import oracle
from ..compare import Answer, assert_as_close_in_bf16, assert_same, assert_true
from ..prompts import LENGTHS, LONG, LONG_ANSWERS, NEW_TOKENS, PROMPTS
from .engines import ask, engine

SHORT = slice(0, 17)


@pytest.fixture(scope="module")
def plain(tiny: Path) -> dict[str, list[Answer]]:
    """Answers to prompts that are each computed in one step; the short ones also one at a time."""
    with engine(tiny) as llm:
        return {
            "whole": ask(llm, PROMPTS, NEW_TOKENS, prompt_logprobs=True),
            "alone": [answer for prompt in PROMPTS[SHORT] for answer in ask(llm, [prompt], NEW_TOKENS)],
            "long": ask(llm, LONG_ANSWERS, LONG),
        }


@pytest.fixture(scope="module")
def whole(plain: dict[str, list[Answer]]) -> list[Answer]:
    return plain["whole"]


@pytest.mark.parametrize("at", range(len(PROMPTS)), ids=[f"{length} tokens" for length in LENGTHS])
def test_whole(whole: list[Answer], truth: Any, at: int):
    assert len(whole[at].prompt_logprobs) == LENGTHS[at] - 1
    assert len(whole[at].tokens) == NEW_TOKENS
    assert_true(whole[at], PROMPTS[at], truth)


@pytest.mark.parametrize("at", range(len(LONG_ANSWERS)))
def test_long_answers(plain: dict[str, list[Answer]], truth: Any, at: int):
    assert_true(plain["long"][at], LONG_ANSWERS[at], truth)


def test_answers_do_not_repeat(whole: list[Answer]):
    """Equal answers prove little if a model says the same whatever it reads."""
    said = [token for answer in whole for token in answer.tokens]
    assert len(set(said)) > len(said) / 4
    assert all(len(set(answer.tokens)) > NEW_TOKENS / 2 for answer in whole)


def test_alone(plain: dict[str, list[Answer]], whole: list[Answer]):
    for found, expected in zip(plain["alone"], whole[SHORT], strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize(("chunk", "form"), [(128, "native"), (640, "default"), (2048, "tiny")])
def test_chunked(chunk: int, form: str, whole: list[Answer], request: pytest.FixtureRequest):
    """Each in another form of the same checkpoint."""
    with engine(request.getfixturevalue(form), chunked_prefill_size=chunk) as llm:
        chunked = ask(llm, PROMPTS, NEW_TOKENS, prompt_logprobs=True)
    for found, expected in zip(chunked, whole, strict=True):
        assert_same(found, expected)
        gaps = torch.tensor(found.prompt_logprobs) - torch.tensor(expected.prompt_logprobs)
        assert gaps.abs().sum() == 0 or gaps.abs().max() <= oracle.LOGPROB_TOLERANCE


def test_text_only(text_only: Path, whole: list[Answer]):
    with engine(text_only) as llm:
        found = ask(llm, PROMPTS[SHORT], NEW_TOKENS)
    for answer, expected in zip(found, whole[SHORT], strict=True):
        assert_same(answer, expected)


def test_bf16(tmp_path: Path):
    from msa_backend.tiny import write_tiny_checkpoint

    model = write_tiny_checkpoint(tmp_path / "bf16", dtype="bfloat16")
    prompts = [oracle.random_prompt(length, seed=2) for length in (100, 900, 1500, 2500)]
    with engine(model, dtype="bfloat16", chunked_prefill_size=512) as llm:
        answers = ask(llm, prompts, 1, prompt_logprobs=True)
    assert_as_close_in_bf16(answers, prompts, model)
