"""What is measured, on an engine that only counts: which prompts it gets, which steps count, what is left out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engine import cells, prompts
from engine.on_vllm import SteppedBatch
from engine.session import FirstToken

STEP = 0.002  # seconds
READ = 0.5  # a step in which a request reads its prompt


class Counting:
    """An engine in which a decode step lasts 2 ms, and the step of a new request half a second."""

    def __init__(self, kv_tokens: int = 10**6, answers: int = 10**6) -> None:
        self.kv_tokens, self.max_model_len, self.answers = kv_tokens, 10**5, answers
        self.resolved = {"max_num_seqs": 4}
        self.now = 0.0
        self.cached: set[tuple[int, ...]] = set()
        self.running: dict[str, int] = {}
        self.waiting: list[str] = []
        self.asked: list[int] = []

    def first_token(self, tokens: list[int]) -> FirstToken:
        blocks = [tuple(tokens[: end + 128]) for end in range(0, len(tokens) - 127, 128)]
        hit = sum(block in self.cached for block in blocks) * 128
        self.cached.update(blocks)
        self.asked.append(len(tokens))
        return FirstToken(wall=2.0, engine=1.0, cached=hit)

    def batch(self) -> SteppedBatch:
        return SteppedBatch(self)

    def start(self, tokens: list[int], new: int) -> str:
        self.waiting.append(f"{len(self.running) + len(self.waiting)}")
        return self.waiting[-1]

    def step(self) -> list[Any]:
        """While requests wait, one reads its prompt and nobody else gets a token; then all decode."""
        if self.waiting:
            self.now += READ
            joined = self.waiting.pop(0)
            self.running[joined] = 0
            return [self.output(joined)]
        self.now += STEP
        return [self.output(name) for name in self.running]

    def output(self, name: str) -> Any:
        self.running[name] += 1
        finished = self.running[name] >= self.answers
        return SimpleNamespace(request_id=name, finished=finished, metrics=SimpleNamespace(last_token_ts=self.now))

    def stop(self, names: set[str]) -> None:
        self.running = {name: count for name, count in self.running.items() if name not in names}

    @contextlib.contextmanager
    def profile(self) -> Iterator[list[Path]]:
        raise AssertionError("no test profiles")
        yield []


def measured(session: Counting, **changes: Any) -> dict[str, dict[str, Any]]:
    plan = cells.Plan(**({"contexts": (1000,), "suffixes": (64,), "batches": (1, 2)} | changes))
    clock = cells.Clock(plan.seconds)
    rows = [
        row
        for context in plan.contexts
        for row in (
            *cells.cold(session, plan, context, clock),
            *cells.suffixes(session, plan, context, clock),
            *cells.decode(session, plan, context, cells.ENGINE, clock),
        )
    ]
    return {f"{row['cell']}, {row['clock']}": row for row in rows}


def test_decode_counts_steps_in_which_all_decode() -> None:
    batch = SteppedBatch(Counting())
    for _ in range(3):
        batch.add([1])
    times = batch.steps(4)
    assert [after - before for before, after in zip(times, times[1:], strict=False)] == pytest.approx([STEP] * 4)


def test_a_step_without_one_of_the_rows_starts_the_count_anew() -> None:
    session = Counting()
    batch = SteppedBatch(session)
    for _ in range(2):
        batch.add([1])
    batch.steps(0)
    whole, numbers = session.step, iter(range(100))
    session.step = lambda: whole()[: 1 if next(numbers) == 2 else 2]  # type: ignore[method-assign]
    batch.steps(3)
    assert next(numbers) == 3 + 4


def test_a_row_that_ends_too_early_is_an_error() -> None:
    batch = SteppedBatch(Counting(answers=3))
    batch.add([1])
    with pytest.raises(RuntimeError, match="batch of 1 ended"):
        batch.steps(5)


def test_every_cell_has_its_samples() -> None:
    session = Counting()
    found = measured(session, repeats=3)
    assert found["TTFT 1,000, wall"]["values"] == [2000.0] * 3
    assert found["TTFT 1,000, engine"]["values"] == [1000.0] * 3
    assert found["suffix 64 @ 1,000, wall"]["values"] == [2000.0] * 3
    assert found["decode 2 @ 1,000, engine"]["values"] == pytest.approx([1e3 * STEP] * 3)
    assert not session.running


def test_a_suffix_has_exactly_its_new_tokens() -> None:
    session = Counting()
    measured(session, suffixes=(64, 200), repeats=1)
    assert 896 + 64 in session.asked and 896 + 200 in session.asked


def test_what_does_not_fit_is_left_out_with_a_reason() -> None:
    found = measured(Counting(kv_tokens=1700), batches=(1, 2, 8), suffixes=(64, 1000))
    assert "1,699 tokens" in found["suffix 1,000 @ 1,000, wall"]["skipped"]
    assert found["decode 1 @ 1,000, engine"]["prefixes"] == 1
    assert "KV cache" in found["decode 2 @ 1,000, engine"]["skipped"]
    assert "max_num_seqs is 4" in found["decode 8 @ 1,000, engine"]["skipped"]
    found = measured(Counting(), row_tokens=1500)
    assert "values" in found["decode 1 @ 1,000, engine"]
    assert "--row-tokens is 1,500" in found["decode 2 @ 1,000, engine"]["skipped"]
    assert all("not within 0 s" in row["skipped"] for row in measured(Counting(), seconds=0).values())


def test_rows_share_prompts_only_where_they_must() -> None:
    found = measured(Counting(), prefix_tokens=10_000)
    assert found["decode 2 @ 1,000, engine"]["prefixes"] == 2
    found = measured(Counting(), prefix_tokens=1999)
    assert found["decode 2 @ 1,000, engine"]["prefixes"] == 1


def test_a_prompt_that_is_not_cold_and_a_hit_that_misses_are_errors() -> None:
    session = Counting()
    session.first_token(prompts.context(1000, 0))
    with pytest.raises(RuntimeError, match="not cold"):
        measured(session)
    session = Counting()
    session.first_token = lambda tokens: FirstToken(1.0, 1.0, 0)  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="is prefix caching on"):
        measured(session)
