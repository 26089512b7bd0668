"""One table of all cells: a figure for each class, by how much the first one wins, and a mark where it loses."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MORE_IS_BETTER = ("tokens/s", "requests/s")
NO_RATIO = ("%",)
WORSE = "slower"


@dataclass
class Row:
    """A cell by one clock.

    Attributes:
        values: of each class the median of its samples; the better of the middle two if they are even in number.
        spread: of each class the smallest and the largest sample.
        skipped: of each class why it has none.
    """

    cell: str
    clock: str
    unit: str = "ms"
    values: dict[str, float] = field(default_factory=dict)
    spread: dict[str, tuple[float, float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def ratio(self, first: str, other: str) -> float | None:
        """How many times as good the first is: above 1 it is faster."""
        if self.unit in NO_RATIO or not self.values.get(first) or not self.values.get(other):
            return None
        mine, theirs = self.values[first], self.values[other]
        return mine / theirs if self.unit in MORE_IS_BETTER else theirs / mine


def rows(runs: Mapping[str, Sequence[Sequence[dict[str, Any]]]]) -> list[Row]:
    """Put samples of the same cell together.

    Args:
        runs: of each class its runs, each a list of `cell, clock, unit, values` or `cell, clock, skipped`.
    """
    table: dict[tuple[str, str], Row] = {}
    samples: dict[tuple[str, str, str], list[float]] = {}
    for name, its in runs.items():
        for entry in (entry for run in its for entry in run):
            key = entry["cell"], entry["clock"]
            row = table.setdefault(key, Row(*key))
            if "skipped" in entry:
                row.skipped[name] = entry["skipped"]
                continue
            row.unit = entry["unit"]
            samples.setdefault((*key, name), []).extend(entry["values"])
    for (cell, clock, name), values in samples.items():
        row = table[cell, clock]
        middle = statistics.median_high if row.unit in MORE_IS_BETTER else statistics.median_low
        row.values[name] = middle(values)
        row.spread[name] = min(values), max(values)
        row.skipped.pop(name, None)
    return list(table.values())


def lines(table: Sequence[Row], classes: Sequence[str]) -> Iterator[str]:
    """The table, and how many cells the first class loses to each other one."""
    first, *others = classes
    head = f"{'':28}{'':10}{'':12}" + "".join(f"{name:>12}" for name in classes)
    yield head + "".join(f"{'to ' + name:>12}" for name in others)
    lost: dict[str, list[str]] = {name: [] for name in others}
    counted = dict.fromkeys(others, 0)
    for row in table:
        line = f"{row.cell:28}{row.clock:10}{row.unit:12}"
        line += "".join(f"{_number(row.values.get(name)):>12}" for name in classes)
        marks = []
        for name in others:
            ratio = row.ratio(first, name)
            line += f"{'-' if ratio is None else f'{ratio:.2f}x':>12}"
            counted[name] += ratio is not None
            # What prints as 1.00x is a draw.
            if ratio is not None and ratio < 0.995:
                marks.append(WORSE if len(others) == 1 else f"{WORSE} than {name}")
                lost[name].append(f"{row.cell} ({row.clock})")
        reasons: dict[str, list[str]] = {}
        for name, reason in row.skipped.items():
            reasons.setdefault(reason, []).append(name)
        marks += [f"{', '.join(skipping)}: {reason}" for reason, skipping in reasons.items()]
        yield (line + ("  " + "; ".join(marks) if marks else "")).rstrip()
    for name in others:
        yield f"{first} against {name}: slower in {len(lost[name])} of {counted[name]} figures"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if value < 1e4 else f"{value:,.0f}"
