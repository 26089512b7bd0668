"""Two tensor-parallel ranks, prompts in chunks with running requests among them, answer as ``transformers`` does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from ..compare import assert_true
from ..oracle import random_prompt
from .engines import ask, engine

PROMPTS = [random_prompt(length, seed=1) for length in (5, 300, 640, 1300)]


def test_two_ranks(tiny: Path, truth: Any, monkeypatch: pytest.MonkeyPatch):
    cores = sorted(os.sched_getaffinity(0))
    # SGLang wants a NUMA node for each rank, or to be told of the cores.
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}")
    with engine(tiny, tp_size=2, chunked_prefill_size=256, enable_mixed_chunk=True) as llm:
        answers = ask(llm, PROMPTS, 16, prompt_logprobs=True)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert_true(answer, prompt, truth)
