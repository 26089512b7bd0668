"""When the jobs of a check run: side by side or alone, after what they wait for, and never past the time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

import pytest
from gpu_check.job import CUT, FAILED, NOT_BEGUN, OK, Job, Outcome, needed
from gpu_check.schedule import GRACE, LEAST, TICK, run


@dataclass
class World:
    """A clock that only sleeping moves, and processes that last as long as they are told to."""

    lasts: dict[str, float]
    """Seconds of each job."""
    status: dict[str, int] = field(default_factory=dict)
    deaf: set[str] = field(default_factory=set)
    """Jobs that an interrupt does not end."""
    now: float = 0.0
    under_way: dict[str, Job] = field(default_factory=dict)
    began: dict[str, float] = field(default_factory=dict)
    most: int = 0
    """Engines that were under way together."""
    beside: dict[str, set[str]] = field(default_factory=dict)
    """Of each job those that were ever under way beside it."""
    killed: list[str] = field(default_factory=list)

    def launch(self, job: Job) -> FakeProcess:
        if self.lasts[job.name] == 0:
            raise OSError("no such program")
        for name in self.under_way:
            self.beside[name].add(job.name)
        self.beside[job.name] = set(self.under_way)
        self.under_way[job.name] = job
        self.most = max(self.most, sum(one.engines for one in self.under_way.values()))
        self.began[job.name] = self.now
        return FakeProcess(self, job)

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def run(self, jobs: Sequence[Job], at_once: int = 8, seconds: float = 1000, **more: object) -> dict[str, Outcome]:
        return run(jobs, self.launch, at_once, seconds, clock=self.clock, sleep=self.sleep, **more)  # type: ignore[arg-type]


class FakeProcess:
    def __init__(self, world: World, job: Job) -> None:
        self.world, self.name = world, job.name
        self.ends = world.now + world.lasts[job.name]
        self.status = world.status.get(job.name, 0)

    def poll(self) -> int | None:
        return self.status if self.world.now >= self.ends else None

    def interrupt(self) -> None:
        if self.name not in self.world.deaf:
            self.ends, self.status = self.world.now, -2

    def kill(self) -> None:
        self.world.killed.append(self.name)
        del self.world.under_way[self.name]


def job(name: str, **how: object) -> Job:
    return Job(name, "vllm:part", ("true",), **how)  # type: ignore[arg-type]


def test_untimed_jobs_run_side_by_side_up_to_the_limit() -> None:
    world = World(dict.fromkeys("abcde", 20.0))
    outcomes = world.run([job(name, engines=3) for name in "abcde"], at_once=8)
    assert {outcome.status for outcome in outcomes.values()} == {OK}
    assert world.most == 6
    assert world.beside["a"] == {"b"}


def test_a_small_job_takes_the_room_that_is_left() -> None:
    world = World({"a": 20, "b": 20, "c": 20})
    world.run([job("a", engines=5), job("b", engines=5), job("c", engines=3)], at_once=8)
    assert world.beside["a"] == {"c"}


def test_a_job_of_more_engines_than_allowed_runs_without_others() -> None:
    world = World({"a": 5, "big": 5, "c": 5})
    outcomes = world.run([job("a"), job("big", engines=9), job("c")], at_once=8)
    assert world.beside["big"] == set() and outcomes["big"].status == OK


def test_timed_jobs_are_last_and_alone() -> None:
    world = World({"t1": 10, "a": 30, "b": 5, "t2": 10})
    world.run([job("t1", timed=True), job("a"), job("b", after=("a",)), job("t2", timed=True)])
    assert world.beside["t1"] == world.beside["t2"] == set()
    assert world.began["b"] < world.began["t1"] < world.began["t2"]


def test_a_job_waits_for_its_model_and_does_not_begin_without() -> None:
    world = World({"good": 10, "bad": 10, "a": 5, "b": 5, "c": 5}, {"bad": 1})
    jobs = [job("good"), job("bad"), job("a", after=("good",)), job("b", after=("good", "bad")), job("c", after=("b",))]
    outcomes = world.run(jobs)
    assert world.began["a"] >= 10
    assert outcomes["bad"] == Outcome(FAILED, pytest.approx(10, abs=2 * TICK), "status 1")
    assert outcomes["b"] == Outcome(NOT_BEGUN, why="bad: failed")
    assert outcomes["c"] == Outcome(NOT_BEGUN, why="b: not begun")
    assert "b" not in world.began


def test_a_program_that_is_missing_is_a_failure_of_its_job_alone() -> None:
    world = World({"a": 0, "b": 5})
    outcomes = world.run([job("a"), job("b")])
    assert outcomes["a"] == Outcome(FAILED, why="no such program")
    assert outcomes["b"].status == OK


def test_all_ends_in_time_and_nothing_begins_late() -> None:
    world = World({"done": 20, "long": inf, "deaf": inf, "late": 5, "timed": 5}, deaf={"deaf"})
    jobs = [job("done"), job("long"), job("deaf"), job("late", after=("done",)), job("timed", timed=True)]
    outcomes = world.run(jobs, at_once=8, seconds=20 + LEAST)
    assert world.now <= 20 + LEAST + GRACE + 2 * TICK
    assert outcomes["done"].status == OK
    assert {outcomes[name].status for name in ("long", "deaf")} == {CUT}
    assert outcomes["timed"] == Outcome(NOT_BEGUN, why="no time was left")
    assert "timed" not in world.began and not world.under_way


def test_a_job_that_ended_well_when_asked_to_end_is_still_cut_if_it_says_so() -> None:
    world = World({"a": inf, "b": 30})
    outcomes = world.run([job("a"), job("b")], seconds=30)
    assert outcomes["b"].status == OK, "it was done when the time was up"
    assert outcomes["a"].status == CUT


def test_whoever_stops_it_gets_what_there_is() -> None:
    world = World({"a": inf, "b": 5, "c": 5})
    outcomes = world.run([job("a"), job("b"), job("c", timed=True)], tick=lambda: world.now < 20)
    assert {name: outcome.status for name, outcome in outcomes.items()} == {"a": CUT, "b": OK, "c": NOT_BEGUN}
    assert world.now < 20 + GRACE + 2 * TICK


def test_what_a_job_left_behind_is_ended_too() -> None:
    world = World({"a": 5})
    world.run([job("a")])
    assert world.killed == ["a"]


def test_each_begin_and_end_is_told() -> None:
    told: list[tuple[str, str | None]] = []
    world = World({"a": 5, "b": 5})
    jobs = [job("a"), job("b", after=("a",))]
    world.run(jobs, tell=lambda job, outcome: told.append((job.name, outcome and outcome.status)))
    assert told == [("a", None), ("a", OK), ("b", None), ("b", OK)]


def test_what_is_needed_comes_once_and_first() -> None:
    every = {one.name: one for one in (job("m"), job("n", after=("m",)), job("a", after=("n", "m")), job("b"))}
    assert [one.name for one in needed([every["a"], every["n"], every["a"]], every)] == ["m", "n", "a"]
