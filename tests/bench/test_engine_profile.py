"""The profile's tables: classes beside each other, the kernels that cost most time and those launched most often."""

from __future__ import annotations

from engine import profile
from engine.timeline import Kernel, Step

LONG, OFTEN = "_attend_rows", "_cast"


def row(step: str, casts: int) -> dict:
    kernels = [Kernel(LONG, 0, 900.0), *(Kernel(OFTEN, 1000 + number, 1.0) for number in range(casts))]
    return profile.entry(step, 20, [Step(0, 0, 1, 1, 0, 500, 2000, kernels)])


def test_classes_stand_beside_each_other() -> None:
    text = list(profile.lines({"ours": [row("decode", 59)], "in-tree": [row("decode", 19)]}, top=1))
    assert text[1].split() == ["decode", "ours", "in-tree"]
    lines = {line[:40].strip(): line[40:].split() for line in text if line.startswith("  ")}
    assert lines["kernels a step"] == ["60.0", "20.0"]
    assert lines["kernels a layer"] == ["3.0", "1.0"]
    assert lines["GPU, sum of kernels, ms"] == ["0.959", "0.919"]
    assert lines["GPU, sum of kernels, us a layer"] == ["48.0", "46.0"]
    assert lines["GPU idle, ms"] == ["1.041", "1.081"]
    assert any(LONG in line and "900.0 us" in line for line in text)
    assert any(OFTEN in line and "59.0 x" in line for line in text)


def test_a_step_that_one_class_lacks() -> None:
    text = "\n".join(profile.lines({"ours": [row("decode", 1)], "in-tree": [profile.entry("decode", 20, [])]}))
    assert "in-tree: the trace has no kernels" in text and "kernels a step" in text
