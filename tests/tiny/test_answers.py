"""Greedy answers wander: a fixture that repeats itself would hide errors."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from msa_backend.tiny.words import WORDS
from tests import oracle

COUNT = 64


def longest_loop(tokens: list[int], period: int) -> int:
    """Length of the longest stretch in which every token equals the one ``period`` before it."""
    longest = current = 0
    for old, new in zip(tokens, tokens[period:], strict=False):
        current = current + 1 if old == new else 0
        longest = max(longest, current)
    return longest


def check(answer: oracle.Greedy) -> None:
    assert len(set(answer.tokens)) >= 0.6 * COUNT
    assert all(longest_loop(answer.tokens, period) < 2 * period for period in (1, 2, 3, 4))
    # Mostly clear decisions: where two tokens are close, lower precision may take the other one.
    assert sorted(answer.margins)[COUNT // 4] > 0.1


@pytest.mark.parametrize("length", [20, 150, 600, 1500])
def test_after_a_random_prompt(length: int, model: Any) -> None:
    check(oracle.greedy(model, oracle.random_prompt(length), COUNT))


@pytest.mark.parametrize(
    "text",
    [
        "Tell me about the river and the old castle.",
        "Why is the sky blue? Explain it to a child in three short sentences, please.",
        " ".join(random.Random(0).choices(WORDS, k=900)) + ".",
    ],
    ids=["short", "question", "900 words"],
)
def test_after_a_text(text: str, original: Path, model: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(original)
    chat = [{"role": "user", "content": text}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    answer = oracle.greedy(model, prompt, COUNT)
    check(answer)
    spoken = tokenizer.decode(answer.tokens)
    assert sum(word.strip(".,?!").isalpha() for word in spoken.split()) > 0.9 * len(spoken.split())
