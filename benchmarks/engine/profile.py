"""Where a step's time goes: kernels and time on the GPU of a decode step, a suffix and a chunk of a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from engine import cells, prompts, timeline
from engine.session import Session


@dataclass(frozen=True)
class Plan:
    """What to profile.

    Attributes:
        contexts: tokens before the new ones.
        batches: requests that decode at once.
        new: tokens of a prompt's last chunk after a prefix hit, for one step each.
        steps: decode steps.
    """

    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    new: tuple[int, ...]
    steps: int = 20


def measure(session: Session, plan: Plan) -> Iterator[dict[str, Any]]:
    """Rows `step, layers` with what `timeline.summary` says of it, or `step, skipped`."""
    layers = session.resolved["layers"]
    for context in plan.contexts:
        cells.fill(session, context, 1)
        for new in plan.new:
            session.first_token(prompts.after_hit(context, 0, new, "profile", new, "before"))
            with session.profile() as files:
                session.first_token(prompts.after_hit(context, 0, new, "profile", new))
            yield entry(f"{new:,} new tokens @ {context:,}", layers, timeline.reading(timeline.read(files[0])))
        batch = session.batch()
        for size in sorted(plan.batches):
            while len(batch.names) < size:
                batch.add(prompts.after_hit(context, 0, cells.ROW, "profile", len(batch.names)))
            batch.steps(cells.SETTLE)
            with session.profile() as files:
                batch.steps_from_now(plan.steps + 2)
            yield entry(f"decode {size} @ {context:,}", layers, timeline.decoding(timeline.read(files[0]), size))
        batch.stop()


def entry(step: str, layers: int, found: list[timeline.Step]) -> dict[str, Any]:
    if not any(one.kernels for one in found):
        return {"step": step, "skipped": "the trace has no kernels of such steps"}
    return {"step": step, "layers": layers} | timeline.summary(found)


TOP = 12
NUMBERS = (
    ("kernels a step", "kernels", "each"),
    ("kernels a layer", "kernels", "a layer"),
    ("copies a step", "copies", "each"),
    ("GPU, sum of kernels, ms", "gpu_ms", "ms"),
    ("GPU, sum of kernels, us a layer", "gpu_ms", "us a layer"),
    ("GPU busy, ms", "busy_ms", "ms"),
    ("GPU idle, ms", "idle_ms", "ms"),
    ("host, forward pass, ms", "host_ms", "ms"),
    ("host's start to last kernel's end, ms", "span_ms", "ms"),
    ("step to step, profiled, ms", "period_ms", "ms"),
)


def lines(profiles: dict[str, list[dict[str, Any]]], top: int = TOP) -> Iterator[str]:
    """The classes beside each other, step by step.

    Args:
        profiles: of each class the rows of `measure`.
        top: how many kernels to name by time, and as many by count.
    """
    steps = dict.fromkeys(row["step"] for rows in profiles.values() for row in rows)
    for step in steps:
        rows = {name: row for name, its in profiles.items() for row in its if row["step"] == step}
        found = {name: row for name, row in rows.items() if "skipped" not in row}
        yield ""
        yield f"{step:40}" + "".join(f"{name:>12}" for name in found)
        for title, key, unit in NUMBERS if found else ():
            yield f"  {title:38}" + "".join(f"{_value(row, key, unit):>12}" for row in found.values())
        for name, row in rows.items():
            if "skipped" in row:
                yield f"  {name}: {row['skipped']}"
                continue
            yield f"  {name}: kernels a step, by time and by count"
            by_count = sorted(row["by_name"], key=lambda kernel: -row["by_name"][kernel]["count"])
            for kernel in dict.fromkeys([*list(row["by_name"])[:top], *by_count[:top]]):
                numbers = row["by_name"][kernel]
                yield f"    {1e3 * numbers['ms']:>10.1f} us {numbers['count']:>8.1f} x  {kernel}"


def _value(row: dict[str, Any], key: str, unit: str) -> str:
    value = row[key]
    if value is None:
        return "-"
    if unit == "each":
        return f"{value:.1f}"
    return f"{value:.3f}" if unit == "ms" else f"{value / row['layers'] * (1e3 if unit == 'us a layer' else 1):.1f}"
