"""Everything that has to be seen on a GPU, in one command and within a given time.

    python benchmarks/gpu_check vllm sglang --out DIR --work DIR --seconds 560
    python benchmarks/gpu_check vllm:kernels vllm:suite vllm:fleet-parts sglang:truth --out DIR --work DIR
    python benchmarks/gpu_check sglang-full-ours --out DIR --work DIR         # one job of a part
    python benchmarks/gpu_check vllm-x2 --out DIR --work DIR                  # what needs two GPUs
    python benchmarks/gpu_check vllm --list                                   # what would be run

What is not timed runs side by side, as many engines at once as --at-once; what is timed runs afterwards, alone. Models
are written into --work once a run, or taken from an earlier one with --keep-models. Logs and JSON are written to
`results/` in --work and, every 15 seconds and at the end, into `gpu-check.tar.gz` in --out, with `summary.json`. The
exit status is 0 if every part is ok.

The engines' requirements conflict, so each may have an interpreter of its own (--vllm-python, --sglang-python), or a
PYTHONPATH of its own (--vllm-path, --sglang-path). Variables set here reach all that is started. In this repository's
folder set PYTHONSAFEPATH=1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from engine import machine
from gpu_check import summary
from gpu_check.host import Host
from gpu_check.job import OK, Job, Outcome
from gpu_check.keep import Archive
from gpu_check.parts import PARTS, chosen
from gpu_check.processes import Process
from gpu_check.schedule import run

ENGINES = ("vllm", "sglang")
RESERVE = 8.0
"""Seconds kept for ending what runs and for packing."""


def main(words: Sequence[str] | None = None) -> int:
    parser = make_parser()
    given = parser.parse_args(words)
    host = host_of(given)
    try:
        jobs = chosen(given.parts, host)
    except ValueError as error:
        parser.error(str(error))
    if given.list:
        print("\n".join(described(job) for job in jobs))
        return 0
    if given.out is None or given.work is None:
        parser.error("--out and --work are missing; name a folder each, or look first with --list")
    if given.seconds <= RESERVE:
        parser.error(f"--seconds is {given.seconds:g}; give more than the {RESERVE:g} that ending and packing may take")
    if given.keep_models:
        jobs = without_written(jobs, host)
    return check(jobs, host, given)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="+", metavar="PART", help=f"vllm, vllm-x2 (on two GPUs), sglang, or of {', '.join(PARTS)}"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="for gpu-check.tar.gz and summary.json")
    parser.add_argument("--work", type=Path, metavar="DIR", help="for models (25 GB with all parts) and results")
    parser.add_argument("--seconds", type=float, default=3600, help="when to have ended (default: %(default)s)")
    at_once = max(1, (os.cpu_count() or 1) // 2)
    parser.add_argument("--at-once", type=int, default=at_once, help="engines side by side (default: half the cores)")
    parser.add_argument("--keep-models", action="store_true", help="take those that an earlier run wrote to --work")
    parser.add_argument("--truth", type=Path, metavar="DIR", help="that write_truth.py wrote elsewhere")
    parser.add_argument("-k", dest="expression", metavar="EXPR", help="of the parts that are tests: which, as pytest")
    parser.add_argument("--list", action="store_true", help="print what would be run")
    for engine in ENGINES:
        parser.add_argument(f"--{engine}-python", metavar="FILE", default=sys.executable, help="its interpreter")
        parser.add_argument(f"--{engine}-path", metavar="DIR[:DIR]", help="its PYTHONPATH")
    return parser


def host_of(given: argparse.Namespace) -> Host:
    paths = {engine: path for engine in ENGINES if (path := getattr(given, f"{engine}_path"))}
    pythons = {engine: getattr(given, f"{engine}_python") for engine in ENGINES}
    work = (given.work or Path("WORK")).absolute()
    return Host(work, pythons, paths, given.truth and given.truth.absolute(), given.expression)


def described(job: Job) -> str:
    """A line as a shell takes it, but for the job's environment and folder."""
    how = "alone" if job.timed else f"{job.engines} at once"
    after = f", after {', '.join(job.after)}" if job.after else ""
    return f"{job.name} ({how}{after}): {shlex.join(job.command)}"


def written(host: Host, job: Job) -> Path:
    """The mark of a model that was written to the end."""
    return host.work / "models" / f"{job.name}.done"


def without_written(jobs: Sequence[Job], host: Host) -> list[Job]:
    """`jobs` without those whose models an earlier run wrote, and nothing waits for them."""
    there = {job.name for job in jobs if job.part == "models" and written(host, job).exists()}
    return [
        replace(job, after=tuple(name for name in job.after if name not in there))
        for job in jobs
        if job.name not in there
    ]


def check(jobs: Sequence[Job], host: Host, given: argparse.Namespace) -> int:
    """Run them, and keep and say what came of them; 0 if all are ok."""
    began = time.monotonic()
    host.prepare()
    given.out.mkdir(parents=True, exist_ok=True)
    archive = Archive(host.results, given.out / "gpu-check.tar.gz")
    stopped: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stopped.append(number))

    def tell(job: Job, outcome: Outcome | None) -> None:
        said = summary.line(outcome) if outcome else "begins"
        print(f"{time.monotonic() - began:6.1f} s  {job.name}: {said}", flush=True)
        if job.part == "models" and outcome and outcome.status == OK:
            written(host, job).touch()

    def tick() -> bool:
        archive.refresh()
        return not stopped

    outcomes = run(
        jobs, lambda job: Process(job, host.log(job.name)), given.at_once, given.seconds - RESERVE, tell, tick
    )
    found = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **machine.facts(),
        "seconds": round(time.monotonic() - began, 1),
        **summary.record(jobs, outcomes),
    }
    for folder in (host.results, given.out):
        (folder / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
    archive.write()
    print("\n".join(summary.lines(jobs, outcomes, host.results)))
    return 0 if all(outcome.status == OK for outcome in outcomes.values()) else 1
