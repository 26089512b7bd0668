"""One process of a check, and how it ended."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """A command, and what it shares the host with.

    Attributes:
        name: of its log and its results; letters, digits and hyphens.
        part: what was asked for, such as "vllm:caches".
        command: the program and its arguments.
        environment: variables beside those of this process.
        folder: to run in; None is this process's.
        after: names of jobs that must have succeeded.
        engines: how many engines, or test processes, run in it at once.
        timed: it has the host to itself.
        tail: lines of its log to show although it succeeded.
    """

    name: str
    part: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None
    after: tuple[str, ...] = ()
    engines: int = 1
    timed: bool = False
    tail: int = 0


OK, FAILED, CUT, NOT_BEGUN = "ok", "failed", "cut", "not begun"
STATUSES = (OK, NOT_BEGUN, CUT, FAILED)
"""From the best to the worst."""


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        status: one of `STATUSES`.
        seconds: that it ran.
        why: of any but ok.
    """

    status: str
    seconds: float = 0.0
    why: str = ""


def needed(wanted: Sequence[Job], all_jobs: Mapping[str, Job]) -> Iterator[Job]:
    """`wanted` and what they wait for, each once, and after what it waits for."""
    seen: set[str] = set()

    def walk(jobs: Iterator[Job]) -> Iterator[Job]:
        for job in jobs:
            if job.name not in seen:
                seen.add(job.name)
                yield from walk(all_jobs[name] for name in job.after)
                yield job

    yield from walk(iter(wanted))
