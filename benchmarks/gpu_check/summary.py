"""What came of a check: how each part ended, in lines for a reader and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu_check.job import CUT, FAILED, OK, STATUSES, Job, Outcome

TAIL = 12
"""Lines of a log that failed or was cut."""
WIDTH = 200


def record(jobs: Sequence[Job], outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """By part its status, which is that of its worst job, and all jobs with what they ran."""
    parts: dict[str, str] = {}
    for job in jobs:
        both = (outcomes[job.name].status, parts.get(job.part, OK))
        parts[job.part] = max(both, key=STATUSES.index)
    each = [asdict(outcomes[job.name]) | {"job": job.name, "command": job.command} for job in jobs]
    return {"parts": parts, "jobs": each}


def lines(jobs: Sequence[Job], outcomes: Mapping[str, Outcome], results: Path) -> Iterator[str]:
    """The ends of logs that matter, then a line for each part and for each of its jobs that is not ok."""
    for job in jobs:
        outcome = outcomes[job.name]
        shown = TAIL if outcome.status in (FAILED, CUT) else job.tail
        if shown and outcome.status in (OK, FAILED, CUT):
            yield f"-- {job.name}: {line(outcome)}"
            yield from tail(results / f"{job.name}.log", shown)
    yield ""
    for part, status in record(jobs, outcomes)["parts"].items():
        of_part = [job for job in jobs if job.part == part]
        took = sum(outcomes[job.name].seconds for job in of_part)
        yield f"{part:<20} {status:<10} {took:5.0f} s"
        if status != OK and len(of_part) > 1:
            yield from (f"    {job.name}: {line(outcomes[job.name])}" for job in of_part)


def line(outcome: Outcome) -> str:
    why = f", {outcome.why}" if outcome.why else ""
    return f"{outcome.status} after {outcome.seconds:.0f} s{why}" if outcome.seconds else outcome.status + why


def tail(log: Path, count: int) -> list[str]:
    """Its last lines that say something, shortened."""
    if not log.exists():
        return []
    said = [one.rstrip() for one in log.read_text(errors="replace").splitlines() if one.strip()]
    return [one if len(one) <= WIDTH else f"{one[:WIDTH]} ..." for one in said[-count:]]
