"""How far two classes' log-probabilities are apart, and what of them stays in the record."""

from __future__ import annotations

from typing import Any

import pytest
from engine import equal, record


def row(length: int, shift: float, tokens: list[int]) -> dict[str, Any]:
    candidates = [{str(token): -1.0 + shift, str(token + 1): -1.25 + shift} for token in tokens]
    answer = {"tokens": tokens, "candidates": candidates}
    return {
        "length": length, "prompt": [-2.0 + shift] * (length - 1),
        "cold": answer, "hit": answer | {"cached_tokens": 128}, "miss": answer,
    }  # fmt: skip


def test_each_class_is_compared_with_each_other() -> None:
    found = {"ours": [row(3000, 0.5, [1, 2, 3])], "in-tree": [row(3000, 0.0, [1, 2, 4])]}
    (entry,) = equal.compare(found).values()
    parts = entry["ours - in-tree"]
    assert set(parts) == {"all blocks taken", "blocks selected"}
    assert parts["all blocks taken"]["mean"] == pytest.approx(0.5)
    assert entry["ours, in-tree: answers"] == {
        "equal tokens": "2 of 3",
        "largest distance": pytest.approx(0.5),
        # Ours prefers 3 to 4; in-tree's candidates are 4 and 5.
        "gap where they part": [pytest.approx(0.25), None],
    }
    assert entry["in-tree: hit against miss"] == {"equal tokens": "3 of 3", "largest distance": 0, "cached": 128}


def test_all_pairs() -> None:
    found = {name: [row(3000, shift, [1])] for name, shift in (("ours", 0.0), ("in-tree", 0.5), ("plain", 0.125))}
    (entry,) = equal.compare(found).values()
    means = {pair: parts["blocks selected"]["mean"] for pair, parts in entry.items() if " - " in pair}
    assert means == {"ours - in-tree": -0.5, "ours - plain": -0.125, "in-tree - plain": 0.375}


def test_a_shift_and_an_outlier_show() -> None:
    gaps = equal.distances([0.0] * 999 + [1.0], [0.0] * 1000)["all blocks taken"]
    assert gaps["mean"] == pytest.approx(1e-3) and gaps["p99"] == 0 and gaps["max"] == 1


def test_the_record_keeps_the_comparison_alone() -> None:
    runs = [
        {"class": name, "round": 0, "seconds": 1, "parts": {"equal": [row(10, shift, [1])]}}
        for name, shift in (("ours", 0.0), ("in-tree", 0.1))
    ]
    found = record.finished({"device": "H200", "versions": {}, "runs": runs})
    assert set(found["equal"]) == {"10"} and all("equal" not in run["parts"] for run in found["runs"])
