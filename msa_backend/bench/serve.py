"""``msa-backend bench serve``: servers beside each other under vLLM's own client, ``vllm bench serve``.

The servers are started by whoever asks, such as one with msa-backend and one with ``MSA_DISABLE=1``. Each is asked the
same random prompts in turn, so that a figure of one stands beside the same figure of the other.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from msa_backend.config import MSAError
from msa_backend.sizes import size, sizes

CLIENT = (sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve")
FIGURES = {
    "TTFT p50, ms": "median_ttft_ms",
    "TTFT p99, ms": "p99_ttft_ms",
    "TPOT p50, ms": "median_tpot_ms",
    "TPOT p99, ms": "p99_tpot_ms",
    "output, tokens/s": "output_throughput",
}
"""What is shown, and what the client calls it."""
MORE_IS_BETTER = "output, tokens/s"


class Cell(NamedTuple):
    """Random prompts of so many tokens, so many at once."""

    tokens: int
    concurrency: int


Found = dict[Cell, dict[str, dict[str, float]]]
"""By cell and server, the median over the rounds of each of :data:`FIGURES`."""


def add_parser(subparsers: Any) -> None:
    """Add ``serve`` to the action that ``add_subparsers`` of ``bench`` returned."""
    parser = subparsers.add_parser(
        "serve",
        help="servers beside each other under `vllm bench serve`",
        description="Ask servers, which run already, the same random prompts in turn with vLLM's own client, and put "
        "their figures into one table. The exit status is 2 if a server or the client fails.",
    )
    parser.add_argument(
        "servers",
        type=_server,
        nargs="+",
        metavar="NAME=URL",
        help="e.g. ours=http://127.0.0.1:8000; others are compared to the first",
    )
    parser.add_argument("--model", help="its name on the servers (default: the first that each lists)")
    parser.add_argument("--tokenizer", metavar="DIR", help="of the model (default: the model's name)")
    parser.add_argument(
        "--lengths", type=sizes, default="1K,8K", metavar="N,...", help="of prompts (default: %(default)s)"
    )
    parser.add_argument(
        "--output", type=size, default=128, metavar="N", help="tokens of an answer (default: %(default)s)"
    )
    parser.add_argument(
        "--concurrency", type=sizes, default="1,8", metavar="N,...", help="at once (default: %(default)s)"
    )
    parser.add_argument(
        "--requests", type=size, metavar="N", help="of a round (default: 4, or twice as many as at once)"
    )
    parser.add_argument(
        "--rounds", type=size, default=3, metavar="N", help="the median is shown (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="of prompts (default: another each time, so none is cached)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="plot them to FILE (needs matplotlib)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """0, or 2 with a sentence on stderr."""
    servers = dict(options.servers)
    try:
        if find_spec("vllm") is None:
            raise MSAError("the client is vLLM's, which is not installed; pip install vllm, on any machine")
        if options.plot and find_spec("matplotlib") is None:
            raise MSAError("--plot needs matplotlib, which is not installed; pip install matplotlib")
        if len(servers) < len(options.servers):
            raise MSAError("two servers have the same name; give each its own")
        if len(set(servers.values())) < len(servers):
            raise MSAError("two names have the same URL, whose prefix cache would answer for the second; start two")
        found = measure(servers, options)
    except MSAError as error:
        print(f"msa-backend bench serve: {error}", file=sys.stderr)
        return 2
    print("\n".join(table(list(servers), found)))
    if options.json:
        cells = [{**cell._asdict(), "servers": of_cell} for cell, of_cell in found.items()]
        options.json.write_text(json.dumps({"servers": servers, "output": options.output, "cells": cells}, indent=1))
    if options.plot:
        plot(list(servers), found, options.plot)
    return 0


def measure(servers: Mapping[str, str], options: argparse.Namespace) -> Found:
    """Every cell, in rounds, on one server after the other.

    Raises:
        MSAError: the client failed, or a request did.
    """
    found: Found = {}
    seed = random.randrange(1 << 30) if options.seed is None else options.seed
    for cell in map(Cell._make, product(options.lengths, options.concurrency)):
        seen: dict[str, list[dict[str, float]]] = {name: [] for name in servers}
        for number in range(options.rounds):
            seed += 1  # prompts of one seed begin alike, and would be found in the prefix cache
            for name, url in servers.items():
                print(
                    f"{cell.tokens:,} tokens, {cell.concurrency} at once, round {number + 1}: {name}", file=sys.stderr
                )
                seen[name].append(ask(name, url, cell, seed, options))
        found[cell] = {
            name: {title: median(result[key] for result in results) for title, key in FIGURES.items()}
            for name, results in seen.items()
        }
    return found


def ask(name: str, url: str, cell: Cell, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """What the client says of one round.

    Raises:
        MSAError: it failed, or a request did.
    """
    requests = options.requests or max(4, 2 * cell.concurrency)
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *CLIENT, "--backend", "openai", "--base-url", url, "--dataset-name", "random", "--seed", str(seed),
            "--random-input-len", str(cell.tokens), "--random-output-len", str(options.output), "--ignore-eos",
            "--num-prompts", str(requests), "--max-concurrency", str(cell.concurrency), "--temperature", "0",
            "--metric-percentiles", "50,99", "--disable-tqdm",
            "--save-result", "--result-dir", folder, "--result-filename", "result.json",
            *(["--model", options.model] if options.model else []),
            *(["--tokenizer", options.tokenizer] if options.tokenizer else []),
        ]  # fmt: skip
        environment = os.environ | {"PYTHONSAFEPATH": "1"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        result = Path(folder, "result.json")
        if done.returncode or not result.exists():
            said = done.stdout.strip().splitlines() or ["nothing"]
            raise MSAError(f"vllm bench serve failed with {name} at {url} ({said[-1]}); run it by itself to see more")
        found = json.loads(result.read_text())
    if found["completed"] != requests:
        raise MSAError(f"{name} answered {found['completed']} of {requests} requests; look in its log")
    return found


def table(servers: Sequence[str], found: Found) -> Iterator[str]:
    """A line for each cell and figure, a column for each server; ratios to the first are above 1 where it is better."""
    yield f"{'prompt':>9} {'at once':>8}  {'':<18}" + "".join(f"{name:>22}" for name in servers)
    for cell, of_cell in found.items():
        for title in FIGURES:
            base = of_cell[servers[0]][title]
            shown = ""
            for name in servers:
                value = of_cell[name][title]
                better, worse = (value, base) if title == MORE_IS_BETTER else (base, value)
                ratio = "" if name == servers[0] else f" ({better / worse:.2f}x)"
                shown += f"{value:.4g}{ratio}".rjust(22)
            yield f"{cell.tokens:>9,} {cell.concurrency:>8}  {title:<18}{shown}"


def plot(servers: Sequence[str], found: Found, path: Path) -> None:
    """A panel for each median and the throughput, a colour for each server, a marker for each concurrency.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = [title for title in FIGURES if "p99" not in title]
    figure, axes = pyplot.subplots(1, len(titles), figsize=(5 * len(titles), 4), layout="constrained")
    for axis, title in zip(axes, titles, strict=True):
        for (number, name), concurrency in product(enumerate(servers), sorted({cell.concurrency for cell in found})):
            cells = [cell for cell in found if cell.concurrency == concurrency]
            values = [found[cell][name][title] for cell in cells]
            marker = "os^vDP*X"[concurrency % 8]
            label = f"{name}, {concurrency} at once"
            axis.plot([cell.tokens for cell in cells], values, color=f"C{number}", marker=marker, label=label)
        axis.set_xscale("log", base=2)
        axis.set(title=title, xlabel="tokens of prompt", ylim=(0, None))
    axes[-1].legend(fontsize="small")
    figure.savefig(path)
    pyplot.close(figure)


def _server(text: str) -> tuple[str, str]:
    name, _, url = text.partition("=")
    if not name or not url.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=URL; write such as ours=http://127.0.0.1:8000")
    return name, url.rstrip("/")
