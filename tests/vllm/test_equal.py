"""vLLM with our model and kernels computes what ``transformers`` computes, on prompts of 1 to 6,000 tokens.

Whole and in chunks of 256, each in another form of the same checkpoint, and under tensor parallelism.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from .. import oracle
from ..compare import Answer, assert_as_close_in_bf16, assert_same, assert_true
from ..prompts import LENGTHS, LONG, LONG_ANSWERS, NEW_TOKENS, PROMPTS
from .engines import ask, engine


@pytest.fixture(scope="module")
def plain(tiny: Path) -> dict[str, list[Answer]]:
    """Answers to prompts that are each computed in one step."""
    with engine(tiny, max_num_batched_tokens=8192) as llm:
        return {
            "whole": ask(llm, PROMPTS, NEW_TOKENS, prompt_logprobs=True),
            "long": ask(llm, LONG_ANSWERS, LONG),
        }


@pytest.fixture(scope="module")
def whole(plain: dict[str, list[Answer]]) -> list[Answer]:
    return plain["whole"]


@pytest.mark.parametrize("at", range(len(PROMPTS)), ids=[f"{length} tokens" for length in LENGTHS])
def test_whole(whole: list[Answer], truth: Any, at: int):
    assert len(whole[at].prompt_logprobs) == LENGTHS[at] - 1
    assert_true(whole[at], PROMPTS[at], truth)


@pytest.mark.parametrize("at", range(len(LONG_ANSWERS)))
def test_long_answers(plain: dict[str, list[Answer]], truth: Any, at: int):
    assert_true(plain["long"][at], LONG_ANSWERS[at], truth)


def test_answers_do_not_repeat(whole: list[Answer]):
    """Equal answers prove little if a model says the same whatever it reads."""
    said = [token for answer in whole for token in answer.tokens]
    assert len(set(said)) > len(said) / 4
    assert all(len(set(answer.tokens)) > NEW_TOKENS / 2 for answer in whole)


def test_chunked(native: Path, whole: list[Answer]):
    with engine(native, max_num_batched_tokens=256) as llm:
        chunked = ask(llm, PROMPTS, NEW_TOKENS, prompt_logprobs=True)
    for found, expected in zip(chunked, whole, strict=True):
        assert_same(found, expected)
        gaps = torch.tensor(found.prompt_logprobs) - torch.tensor(expected.prompt_logprobs)
        assert gaps.abs().sum() == 0 or gaps.abs().max() <= oracle.LOGPROB_TOLERANCE


def test_text_only(text_only: Path, whole: list[Answer]):
    short = slice(0, 17)
    with engine(text_only) as llm:
        found = ask(llm, PROMPTS[short], NEW_TOKENS)
    for answer, expected in zip(found, whole[short], strict=True):
        assert_same(answer, expected)


def test_two_ranks(default: Path, whole: list[Answer], monkeypatch: pytest.MonkeyPatch):
    """One KV head, one index head and half the experts' width on each of two ranks."""
    # Left to itself vLLM wants a memory node a rank, which small machines do not have.
    cores = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}")
    with engine(default, tensor_parallel_size=2, max_num_batched_tokens=2048) as llm:
        found = ask(llm, PROMPTS, NEW_TOKENS)
    for answer, expected in zip(found, whole, strict=True):
        assert_same(answer, expected)


def test_bf16(tmp_path: Path):
    from msa_backend.tiny import write_tiny_checkpoint

    model = write_tiny_checkpoint(tmp_path / "bf16", dtype="bfloat16")
    prompts = [oracle.random_prompt(length, seed=2) for length in (100, 900, 1500, 2500)]
    with engine(model, dtype="bfloat16", max_num_batched_tokens=512) as llm:
        answers = ask(llm, prompts, 1, prompt_logprobs=True)
    assert_as_close_in_bf16(answers, prompts, model)
