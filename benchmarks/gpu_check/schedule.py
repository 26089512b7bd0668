"""Which job runs when: side by side where nothing is timed, alone where something is, and none past the time limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from gpu_check.job import CUT, FAILED, NOT_BEGUN, OK, Job, Outcome

TICK = 0.5  # seconds
GRACE = 4.0
"""Seconds from the request to end to the end itself."""
LEAST = 10.0
"""Seconds that must be left for a job to begin: no engine starts in less."""


class Process(Protocol):
    """What is asked of a job's process; see processes.py."""

    def poll(self) -> int | None: ...
    def interrupt(self) -> None: ...
    def kill(self) -> None: ...


@dataclass
class Running:
    """A job under way."""

    job: Job
    process: Process
    began: float
    interrupted: float | None = None


def run(
    jobs: Sequence[Job],
    launch: Callable[[Job], Process],
    at_once: int,
    seconds: float,
    tell: Callable[[Job, Outcome | None], None] = lambda job, outcome: None,
    tick: Callable[[], bool] = lambda: True,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Outcome]:
    """Run all of `jobs`, in their order as far as the host has room. It ends `GRACE` after `seconds` at the latest.

    Jobs that are timed come last, one at a time.

    Args:
        launch: starts a job; OSError is a failure of it.
        at_once: engines that may run side by side; a job of more runs beside no other.
        seconds: when to end what still runs.
        tell: called with each job when it begins, and with its outcome when it ends.
        tick: called all the time; False ends everything.
    """
    deadline = clock() + seconds
    waiting, running, outcomes = list(jobs), dict[str, Running](), dict[str, Outcome]()

    def end(job: Job, outcome: Outcome) -> None:
        outcomes[job.name] = outcome
        tell(job, outcome)

    while waiting or running:
        if not tick():
            deadline = min(deadline, clock())
        for name, one in list(running.items()):
            status = one.process.poll()
            if status is None and one.interrupted is None and clock() >= deadline:
                one.process.interrupt()
                one.interrupted = clock()
            if status is None and (one.interrupted is None or clock() < one.interrupted + GRACE):
                continue
            one.process.kill()
            del running[name]
            end(one.job, _outcome(status, clock() - one.began, one.interrupted is not None))
        for job in list(waiting):
            if why := _never(job, outcomes, clock() > deadline - LEAST):
                waiting.remove(job)
                end(job, Outcome(NOT_BEGUN, why=why))
            elif _fits(job, waiting, running, outcomes, at_once):
                waiting.remove(job)
                tell(job, None)
                try:
                    running[job.name] = Running(job, launch(job), clock())
                except OSError as error:
                    end(job, Outcome(FAILED, why=str(error)))
        sleep(TICK)
    return outcomes


def _outcome(status: int | None, seconds: float, interrupted: bool) -> Outcome:
    if status == 0:
        return Outcome(OK, seconds)
    if interrupted:
        return Outcome(CUT, seconds, "the time was up")
    return Outcome(FAILED, seconds, f"status {status}")


def _never(job: Job, outcomes: Mapping[str, Outcome], late: bool) -> str:
    """Why it cannot begin any more; empty if it can."""
    for name in job.after:
        if name in outcomes and outcomes[name].status != OK:
            return f"{name}: {outcomes[name].status}"
    return "no time was left" if late else ""


def _fits(
    job: Job, waiting: Sequence[Job], running: Mapping[str, Running], outcomes: Mapping[str, Outcome], at_once: int
) -> bool:
    if any(name not in outcomes for name in job.after):
        return False
    if not running:
        return not job.timed or all(other.timed for other in waiting)
    busy = sum(one.job.engines for one in running.values())
    return not (job.timed or any(one.job.timed for one in running.values())) and busy + job.engines <= at_once
