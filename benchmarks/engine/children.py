"""Each class of model in a process of its own: which class an engine takes is settled once a process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engine import cells, engines, equal, profile, truth
from engine.engines import Engine

PARTS: dict[str, tuple[type, Callable[..., Iterator[dict[str, Any]]]]] = {
    "cells": (cells.Plan, cells.measure),
    "profile": (profile.Plan, profile.measure),
    "equal": (equal.Plan, equal.measure),
    "truth": (truth.Plan, truth.measure),
}
NEWS = "[bench] "  # begins a line that the parent shows


@dataclass(frozen=True)
class Class:
    """How a class of model is chosen.

    Attributes:
        environment: variables of its process.
        options: of the engine, beside those of all.
    """

    environment: dict[str, str]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        return self.environment["MSA_DISABLE"] == OURS["MSA_DISABLE"]


OURS, IN_TREE = {"MSA_DISABLE": "0"}, {"MSA_DISABLE": "1"}
NAMES = ("ours", "in-tree", "eager")


def classes(engine: Engine) -> dict[str, Class]:
    """By their names; eager is ours without graphs."""
    return dict(zip(NAMES, (Class(OURS), Class(IN_TREE), Class(OURS, engine.eager)), strict=True))


def environment(engine: Engine, one: Class) -> dict[str, str]:
    """All variables of the process that measures a class."""
    fixed = {"HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **fixed, **engine.environment, **one.environment}


def run(
    engine: str,
    name: str,
    one: Class,
    options: dict[str, Any],
    plans: dict[str, Any],
    folder: Path,
    show: Callable[[str], None],
) -> dict[str, Any]:
    """Start an engine with a class in a child process and measure the parts that have a plan.

    Args:
        engine: one of ENGINES.
        name: of the class, and of its log.
        options: of the engine, those of the class among them.
        plans: by part, in the order to run them.
        folder: for the child's log and its report.
        show: called with each row as a line, when it is measured.

    Returns:
        `Session.header`, and under `parts` the rows of each part. Had the child failed, what it found until then and
        under `failed` the end of its log.
    """
    job = {"engine": engine, "options": options, "plans": {part: asdict(plan) for part, plan in plans.items()}}
    (file := folder / f"{name}-job.json").write_text(json.dumps(job))
    report = folder / f"{name}-report.json"
    report.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).parent), "child", str(file), str(report)]
    last: deque[str] = deque(maxlen=40)
    with (folder / f"{name}.log").open("a") as log:
        process = subprocess.Popen(
            command, env=environment(engines.ENGINES[engine], one), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                last.append(line)
                if line.startswith(NEWS):
                    show(line.removeprefix(NEWS).rstrip())
            status = process.wait()
        finally:
            # An engine that outlived the child would hold the GPU's memory when the next one starts.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found = json.loads(report.read_text()) if report.exists() else {"parts": {}}
    if status:
        found["failed"] = f"{''.join(last)}It ended with status {status}; all it said is in {log.name}."
    return found


def work(job_file: Path, report_file: Path) -> None:
    """What the child does; the report is written anew after every row, so that a crash loses only the next."""
    began = time.monotonic()

    def tell(news: str) -> None:
        print(f"{NEWS}{time.monotonic() - began:6.1f} s  {news}", flush=True)

    job = json.loads(job_file.read_text())
    session = engines.start(job["engine"], job["options"])
    report = session.header() | {"parts": {}}
    tell(report["resolved"]["model_class"])
    for part, fields in job["plans"].items():
        rows = report["parts"].setdefault(part, [])
        for row in PARTS[part][1](session, plan(part, fields)):
            rows.append(row)
            report_file.write_text(json.dumps(report))
            tell(brief(row))


def plan(part: str, fields: dict[str, Any]) -> Any:
    """The plan of a part from JSON, which has no tuples."""
    return PARTS[part][0](**{key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()})


def brief(row: dict[str, Any]) -> str:
    """A row in a line, to show that the work goes on."""
    title = row.get("cell") or row.get("step") or f"prompt of {row['length']:,}"
    if "skipped" in row:
        return f"{title} ({row.get('clock', 'profile')}): skipped, {row['skipped']}"
    if "values" in row:
        return f"{title} ({row['clock']}): {', '.join(f'{value:.4g}' for value in row['values'])} {row['unit']}"
    return f"{title}: {row['kernels']:.0f} kernels, {row['gpu_ms']:.3f} ms" if "gpu_ms" in row else title
