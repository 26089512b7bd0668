"""How SGLang's news of running requests become times of steps, and what is taken from a file of the truth."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engine import timeline, truth
from engine.on_sglang import StreamedBatch

STEP = 0.5


def batch(news: list[tuple[str, float, int, bool]], names: set[str]) -> StreamedBatch:
    made = StreamedBatch(SimpleNamespace(news=iter(news).__next__))
    made.names = names
    return made


def test_steps_between_news_are_equally_long() -> None:
    """From when every request has been heard twice: a third one still read its prompt until 20 s."""
    news = [("a", 1.0, 1, False), ("a", 9.0, 17, False), ("b", 20.0, 1, False), ("gone", 21.0, 9, True)]
    news += [("a", 27.0, 33, False), ("b", 28.0, 17, False), ("a", 35.0, 49, False), ("b", 36.0, 33, False)]
    news += [("a", 43.0, 65, False), ("b", 44.0, 49, False)]
    times = batch(news, {"a", "b"}).steps(20)
    assert times == [28.0 + STEP * step for step in range(21)]


def test_a_request_that_ends_is_an_error() -> None:
    news = [("a", 1.0, 1, False), ("a", 9.0, 17, False), ("a", 10.0, 19, True)]
    with pytest.raises(RuntimeError, match="batch of 1 ended"):
        batch(news, {"a"}).steps(10)


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("step[EXTEND bs=2 toks=8192]", (2, 8192, 0, 0)),
        ("step[DECODE bs=32]", (0, 0, 32, 32)),
        ("execute_context_1(171)_generation_2(3)", (1, 171, 2, 3)),
        ("step[IDLE bs=0]", None),
        ("run_batch", None),
    ],
)
def test_both_engines_annotations(name: str, counts: Any) -> None:
    assert timeline.requests_and_tokens(name) == counts


class Answering:
    """An engine that is off by 0.1 everywhere, and says the same cold and after a hit."""

    def ask(self, tokens: list[int], new: int, *, fresh: bool = False) -> dict[str, Any]:
        said: dict[str, Any] = {"tokens": [1] * new, "cached_tokens": 0 if fresh else 128}
        return said | {"prompt": [-1.1] * (len(tokens) - 1)} if fresh else said


@pytest.mark.parametrize(("transformers", "close"), [(0.07, True), (0.06, False)])
def test_as_close_as_transformers(tmp_path: Path, transformers: float, close: bool) -> None:
    entries = [
        {"prompt": [5] * length, "fp32": [-1.0] * (length - 1), "bf16": [-1.0 - transformers] * (length - 1)}
        for length in (100, 200)
    ]
    file = tmp_path / "truth.json"
    file.write_text(json.dumps(entries))
    found = truth.summary(list(truth.measure(Answering(), truth.Plan(str(file)))))  # type: ignore[arg-type]
    assert found["as close"] == close
    assert found["mean"] == {"engine": 0.1, "transformers in bf16": transformers}
    assert found["answers equal after a hit"] == "2 of 2" and found["cached"] == [128, 128]
