"""Prefix hits, eviction, preemption and drafts change when things are computed, never what."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..compare import Answer, assert_same
from ..prompts import BLOCKS, BRANCH, FIRST, LONGER, MANY, MANY_TOKENS
from .engines import ask, engine, metric

NEW_TOKENS = 12


@pytest.fixture(scope="module")
def plain(tiny: Path) -> dict[str, list[Answer]]:
    """Answers without any cache to share, each prompt in one step."""
    with engine(tiny, max_num_batched_tokens=8192) as llm:
        return {
            "prefix": ask(llm, [FIRST, BRANCH, LONGER, BLOCKS], NEW_TOKENS),
            "many": ask(llm, MANY, MANY_TOKENS),
        }


@pytest.mark.parametrize("chunk", [192, 4096])
def test_prefix_hits(tiny: Path, plain: dict[str, list[Answer]], chunk: int):
    """Chunks of 192 tokens end in the middle of blocks."""
    first, branch, longer, blocks = plain["prefix"]
    with engine(tiny, enable_prefix_caching=True, max_num_batched_tokens=chunk) as llm:
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
def test_a_cache_too_small_for_the_load(tiny: Path, plain: dict[str, list[Answer]], caching: bool):
    """Requests are thrown out and recomputed, and cached prefixes evicted: 24 blocks for a load of 60."""
    with engine(
        tiny,
        enable_prefix_caching=caching,
        num_gpu_blocks_override=24,
        max_model_len=2048,
        max_num_batched_tokens=512,
        disable_log_stats=False,
    ) as llm:
        for _ in range(2):
            answers = ask(llm, MANY, MANY_TOKENS)
            for answer, expected in zip(answers, plain["many"], strict=True):
                assert_same(answer, expected)
        assert metric(llm, "vllm:num_preemptions") > 0


def test_drafts_to_verify(tiny: Path, plain: dict[str, list[Answer]]):
    """Draft tokens found by n-gram look-up in the prompt make rows of several decode tokens."""
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    with engine(
        tiny,
        speculative_config=drafts,
        enable_prefix_caching=True,
        max_num_batched_tokens=512,
        disable_log_stats=False,
    ) as llm:
        answers = ask(llm, MANY, MANY_TOKENS)
        assert metric(llm, "vllm:spec_decode_num_draft_tokens") > 0
        print("accepted drafts:", metric(llm, "vllm:spec_decode_num_accepted_tokens"))
    for answer, expected in zip(answers, plain["many"], strict=True):
        assert_same(answer, expected)
