"""Radix-cache hits, eviction and retraction change when things are computed, never what."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..compare import Answer, assert_same
from ..prompts import BLOCKS, BRANCH, FIRST, LONGER, MANY, MANY_TOKENS
from .engines import ask, engine, generate, read

NEW_TOKENS = 12


@pytest.fixture(scope="module")
def plain(tiny: Path) -> dict[str, list[Answer]]:
    """Answers without any cache to share, each prompt in one step."""
    with engine(tiny) as llm:
        return {
            "prefix": ask(llm, [FIRST, BRANCH, LONGER, BLOCKS], NEW_TOKENS),
            "many": ask(llm, MANY, MANY_TOKENS),
        }


@pytest.mark.parametrize("chunk", [384, 4096])
def test_prefix_hits(tiny: Path, plain: dict[str, list[Answer]], chunk: int):
    first, branch, longer, blocks = plain["prefix"]
    with engine(tiny, disable_radix_cache=False, chunked_prefill_size=chunk) as llm:
        for prompt, cached, expected in (
            (FIRST, 0, first),
            (FIRST, 1280, first),
            (BRANCH, 896, branch),
            (LONGER, 1280, longer),
            (BLOCKS, 0, blocks),
            (BLOCKS, 896, blocks),
            (FIRST, 1280, first),
        ):
            (answer,) = ask(llm, [prompt], NEW_TOKENS)
            assert answer.cached == cached
            assert_same(answer, expected)
        together = ask(llm, [BRANCH, LONGER, BLOCKS, FIRST], NEW_TOKENS)
        for answer, expected in zip(together, (branch, longer, blocks, first), strict=True):
            assert answer.cached >= 896
            assert_same(answer, expected)


@pytest.mark.parametrize("caching", [True, False])
def test_a_cache_too_small_for_the_load(
    tiny: Path, plain: dict[str, list[Answer]], caching: bool, monkeypatch: pytest.MonkeyPatch
):
    """Requests are taken back and resumed, and cached prefixes evicted: 24 pages for a load of 59.

    SGLang admits requests so carefully that it seldom has to take one back. Its own switch for tests does it every 50
    steps, on the path that it takes when memory has run out.
    """
    monkeypatch.setenv("SGLANG_TEST_RETRACT", "1")
    monkeypatch.setenv("SGLANG_TEST_RETRACT_INTERVAL", "50")
    with engine(
        tiny,
        disable_radix_cache=not caching,
        max_total_tokens=24 * 128,
        context_length=2048,
        chunked_prefill_size=512,
    ) as llm:
        retractions = 0
        for _ in range(2 if caching else 1):
            outputs = generate(llm, MANY, MANY_TOKENS)
            retractions += sum(output["meta_info"]["num_retractions"] for output in outputs)
            for output, expected in zip(outputs, plain["many"], strict=True):
                assert_same(read(output), expected)
    assert retractions > 0
