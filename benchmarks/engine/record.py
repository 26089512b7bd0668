"""The record of one or more runs: what each process found, and the tables over all of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from engine import equal, profile, table, truth

WHAT = "ours: msa-backend; in-tree: the engine's own class; eager: ours without CUDA graphs"
RESOLVED = ("cudagraph_mode", "max_num_seqs", "max_num_batched_tokens", "kv_cache_tokens", "model_runner")


def finished(record: dict[str, Any]) -> dict[str, Any]:
    """`record` with its tables, and without the log-probabilities that comparisons were made from.

    Args:
        record: its `runs` have `class`, `round`, `parts`, and what `Session.header` says.
    """
    raw = {run["class"]: run["parts"].pop("equal") for run in record["runs"] if "equal" in run["parts"]}
    if raw:
        record["equal"] = equal.compare(raw)
    exact = {run["class"]: truth.summary(rows) for run in record["runs"] if (rows := run["parts"].pop("truth", None))}
    if exact:
        record["truth"] = exact
    record["table"] = [vars(row) for row in table.rows(timed(record))]
    return record


def joined(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several finished records as one; samples of the same cell stand together."""
    record: dict[str, Any] = {"what": WHAT}
    for key in ("engine", "command", "date", "device", "versions"):
        each = [one.get(key, "vllm") for one in records]  # the first results were all of vLLM and did not say so
        record[key] = each[0] if all(value == each[0] for value in each) else each
    record["runs"] = [run for one in records for run in one["runs"]]
    for one in records:
        for compared in ("equal", "truth"):
            if compared in one:
                record[compared] = record.get(compared, {}) | one[compared]
    return finished(record)


def timed(record: dict[str, Any]) -> dict[str, list[list[dict[str, Any]]]]:
    """Of each class the rows of every run that belong into the table."""
    runs: dict[str, list[list[dict[str, Any]]]] = {}
    for run in record["runs"]:
        for part in ("cells", "serve"):
            if part in run["parts"]:
                runs.setdefault(run["class"], []).append(run["parts"][part])
    return runs


def failures(record: dict[str, Any]) -> list[str]:
    """A few lines for each process that failed."""
    return [
        f"{run['class']}, round {run['round'] + 1}, FAILED: " + "\n".join(run["failed"].splitlines()[-5:])
        for run in record["runs"]
        if "failed" in run
    ]


def lines(record: dict[str, Any]) -> Iterator[str]:
    """Everything a reader wants to see of a finished record."""
    yield f"{record.get('engine', 'vllm')}, {record['device']}, {record['versions']}"
    for run in record["runs"]:
        head = f"{run['class']}: {run['seconds']:.0f} s in all"
        if "resolved" in run:
            sizes = run["resolved"]["cudagraph_capture_sizes"]
            chosen = ", ".join(f"{key} {run['resolved'][key]}" for key in RESOLVED)
            head += f", {run['start_seconds']} s of it to start; {chosen}"
            head += f", {len(sizes)} capture sizes to {max(sizes, default=0)}"
        yield head
    runs = timed(record)
    if runs:
        yield ""
        yield from table.lines(table.rows(runs), list(runs))
    profiles: dict[str, list[dict[str, Any]]] = {}
    for run in record["runs"]:
        profiles.setdefault(run["class"], []).extend(run["parts"].get("profile", []))
    yield from profile.lines(profiles)
    if "equal" in record:
        yield json.dumps(record["equal"], indent=1)
    if "truth" in record:
        yield json.dumps(record["truth"], indent=1)
    yield from failures(record)
