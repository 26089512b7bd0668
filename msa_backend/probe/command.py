"""``msa-backend probe``: the command line."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from msa_backend.sizes import sizes

from . import report
from .cells import BOUNDARY, KEPT_FREE, Cell, Results, Settings, calibrate, grid, measure
from .client import Client, ProbeError
from .tasks import TASKS

SHORTEST = 4096


def add_parser(subparsers: Any) -> None:
    """Add the subcommand ``probe`` to the action that ``ArgumentParser.add_subparsers`` returned."""
    parser = subparsers.add_parser(
        "probe",
        help="check that a server finds facts anywhere in a long prompt",
        description="Ask an OpenAI-compatible server for facts at given depths of long prompts, each prompt "
        "cold and again from the prefix cache. The exit status is 1 if a task scores below the threshold, 2 if the "
        "server cannot be probed.",
    )
    parser.add_argument("url", metavar="URL", help="the server, e.g. http://127.0.0.1:8000")
    parser.add_argument("--model", default="", help="its name there (default: the first that the server lists)")
    parser.add_argument(
        "--tasks",
        type=_tasks,
        default=["needle"],
        metavar="TASK,...",
        help=f"any of {', '.join([*TASKS, BOUNDARY])}, or all (default: needle)",
    )
    parser.add_argument(
        "--lengths", type=sizes, metavar="N,...", help="of prompts, e.g. 4K,32K (default: 4K doubling to the limit)"
    )
    parser.add_argument(
        "--depths",
        type=_depths,
        default=[0.0, 0.25, 0.5, 0.75, 1.0],
        metavar="P,...",
        help="in %% (default: 0,25,50,75,100)",
    )
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="prompts per cell (default: %(default)s)")
    parser.add_argument("--cold-only", action="store_true", help="do not ask again from the prefix cache")
    parser.add_argument("--threshold", type=float, default=0.95, metavar="X", help="least score (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=1, metavar="N", help="at once (default: %(default)s)")
    parser.add_argument(
        "--timeout", type=float, default=600, metavar="SECONDS", help="per request (default: %(default)s)"
    )
    parser.add_argument("--retries", type=int, default=2, metavar="N", help="per request (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="other facts and texts (default: %(default)s)")
    parser.add_argument(
        "--body", type=json.loads, default={}, metavar="JSON",
        help='added to each request, e.g. {"chat_template_kwargs": {"thinking_mode": "disabled"}}',
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="results; an unfinished run goes on from them")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot the maps to FILE (needs matplotlib)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """0 if every task reaches the threshold, 1 if not, 2 with a sentence on stderr if nothing can be said."""
    if options.plot and find_spec("matplotlib") is None:
        return _refuse("--plot needs matplotlib, which is not installed; pip install matplotlib")
    client = Client(
        options.url.rstrip("/").removesuffix("/v1"),
        timeout=options.timeout,
        retries=options.retries,
        key=os.environ.get("OPENAI_API_KEY"),
        more=options.body,
    )
    try:
        model = _model(client, options.model)
        client = replace(client, model=model["id"])
        lengths = options.lengths or _up_to(model.get("max_model_len"))
        settings = Settings(model["id"], options.repeats, options.seed, not options.cold_only)
        results = Results(options.json, settings)
        cells = grid(options.tasks, lengths, options.depths)
        _measure(client, cells, results, options.concurrency)
    except ProbeError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        return _refuse("interrupted" + ("; the same command goes on from here" if options.json else ""))
    asked = {cell.key: results.cells[cell.key] for cell in cells}
    print("\n".join(report.lines(asked)))
    if options.plot:
        report.plot(asked, options.plot, f"{model['id']} at {options.url}")
    print()
    means = report.means(asked)
    for task, mean in means.items():
        print(
            f"{task:<12}{100 * mean:5.1f} %"
            + (f", below {100 * options.threshold:g}" if mean < options.threshold else "")
        )
    return int(min(means.values()) < options.threshold)


def _measure(client: Client, cells: list[Cell], results: Results, concurrency: int) -> None:
    total, started = len(cells), time.monotonic()
    done = sum(cell.key in results.cells for cell in cells)
    if done == total:
        return
    scale = calibrate(client, min(cell.length for cell in cells))
    # On a terminal one line that changes, in a log a line each.
    begin, end = ("\r", "") if sys.stderr.isatty() else ("", "\n")
    for cell, result in measure(client, cells, results, scale, concurrency):
        done += 1
        line = f"{done} of {total}: {cell.key}: {100 * result['score']:.0f} %, {result['seconds']:.1f} s"
        print(begin + line.ljust(0 if end else 78), end=end, file=sys.stderr)
    if not end:
        print(f"\r{'':<78}\r{time.monotonic() - started:.0f} s", file=sys.stderr)


def _model(client: Client, name: str) -> dict[str, Any]:
    found = client.models()
    for model in found:
        if name in ("", model["id"]):
            return model
    listed = ", ".join(model["id"] for model in found) or "none"
    raise ProbeError(f"--model is {name or 'not given'}, but the server lists {listed}; choose one of them")


def _up_to(limit: int | None) -> list[int]:
    if limit is None:
        raise ProbeError("the server does not say how long its prompts may be; pass --lengths")
    lengths: list[int] = []
    while (length := SHORTEST << len(lengths)) <= limit - KEPT_FREE:
        lengths.append(length)
    if lengths and lengths[-1] < (limit - KEPT_FREE) * 0.75:
        lengths.append(int((limit - KEPT_FREE) * 0.95))
    return lengths or [max(256, limit - KEPT_FREE)]


def _refuse(sentence: str) -> int:
    print(f"msa-backend probe: {sentence}", file=sys.stderr)
    return 2


def _tasks(text: str) -> list[str]:
    known = [*TASKS, BOUNDARY]
    found = known if text == "all" else text.split(",")
    if unknown := sorted(set(found) - set(known)):
        raise argparse.ArgumentTypeError(f"{unknown[0]} is no task; choose from {', '.join(known)}")
    return found


def _depths(text: str) -> list[float]:
    found = [float(part) / 100 for part in text.split(",")]
    if any(not 0 <= depth <= 1 for depth in found):
        raise argparse.ArgumentTypeError("depths are percentages from 0 to 100")
    return found
