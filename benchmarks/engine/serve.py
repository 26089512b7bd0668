"""What a client sees: `vllm serve` under `vllm bench serve`.

On conversations, whose prompts are almost all cached, and on random prompts, of which nothing is.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from engine import conversations, prompts

# Not the script `vllm`: where vLLM was laid in place by hand there is none.
VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")
START_LIMIT = 600  # seconds
BENCH_LIMIT = 1800
LAST_LINES = 30
ACCESS = re.compile(r'INFO: +\S+ - ".* HTTP/[\d.]+" \d+')
"""A line of a server's log about one request: after a fault there are many of them."""
METRICS = (
    ("output", "tokens/s", "output_throughput"),
    ("total", "tokens/s", "total_token_throughput"),
    ("TTFT p50", "ms", "median_ttft_ms"),
    ("TTFT p99", "ms", "p99_ttft_ms"),
    ("TPOT p50", "ms", "median_tpot_ms"),
    ("TPOT p99", "ms", "p99_tpot_ms"),
)


RANDOM_ANSWER = 128  # tokens, after each random prompt


@dataclass(frozen=True)
class Plan:
    """What to replay.

    Attributes:
        concurrency: requests under way at once; one replay each, of a trace of its own.
        shape: of the conversations.
        random_tokens: lengths of random prompts; one replay each, the last of `concurrency` at once.
    """

    concurrency: tuple[int, ...]
    shape: conversations.Shape
    random_tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class Start:
    """How a server starts.

    Attributes:
        options: of `vllm.LLM`, the model among them; passed as flags.
        environment: of the server, beside this process's.
    """

    options: dict[str, Any]
    environment: dict[str, str]

    @property
    def model(self) -> str:
        return self.options["model"]

    def command(self) -> list[str]:
        """What starts the server, but for where it listens."""
        return [*VLLM, "serve", self.model, *flags({k: v for k, v in self.options.items() if k != "model"})]


def measure(
    starts: Mapping[str, Start], plan: Plan, rounds: int, folder: Path
) -> Iterator[tuple[str, int, dict[str, Any] | str]]:
    """Start a server for each name, all at once, and replay on one after the other.

    Every server sees the same requests in the same order, and only one works at a time. A round of its own brings
    new conversations, so that none is cached from the last one.

    Args:
        folder: where traces, results of the client and the servers' logs are written.

    Yields:
        Name, round, and a row `cell, clock, unit, values`; or what was printed where the server did not start or a
        replay failed, by the client and then by the server, after which nothing more is asked of it.
    """
    with contextlib.ExitStack() as stack:
        alive: dict[str, Any] = {}
        for name, found in _started(starts, folder, stack):
            if isinstance(found, Exception):
                yield name, 0, str(found)
            else:
                alive[name] = found
        for number in range(rounds):
            for cell, dataset, concurrency, requests in _replays(plan, number, folder):
                for name, server in list(alive.items()):
                    out = file_of(folder, f"{name}-{cell}-{number}.json")
                    try:
                        for row in _rows(cell, replay(starts[name].model, server, dataset, requests, concurrency, out)):
                            yield name, number, row
                    except (RuntimeError, OSError) as error:
                        del alive[name]
                        yield name, number, f"{error}\n{_last_words(_log(folder, name))}"


def _started(starts: Mapping[str, Start], folder: Path, stack: contextlib.ExitStack) -> Iterator[tuple[str, Any]]:
    """Each name with its server, or with the error that it did not start with."""

    def enter(name: str) -> Any:
        start = starts[name]
        context = running(start.command(), [], start.environment, START_LIMIT, _log(folder, name))
        try:
            return stack.enter_context(context)
        except (RuntimeError, OSError) as error:
            return error

    running = _server_module().running
    with ThreadPoolExecutor(len(starts)) as pool:
        yield from zip(starts, pool.map(enter, starts), strict=True)


def _log(folder: Path, name: str) -> Path:
    """All that the server of a class prints."""
    return file_of(folder, f"{name}-server.log")


def file_of(folder: Path, name: str) -> Path:
    """For what belongs to a class or a replay of any name."""
    return folder / name.replace(" ", "-")


def _last_words(log: Path) -> str:
    """The end of what a server printed: why a request failed is there and not with the client."""
    said = [line for line in log.read_text(errors="replace").splitlines() if line.strip() and not ACCESS.search(line)]
    return "\n".join([f"The server's last lines, of {log}:", *said[-LAST_LINES:]])


def _replays(plan: Plan, number: int, folder: Path) -> Iterator[tuple[str, list[str], int, int]]:
    """Title, dataset as flags of the client, requests at once and in all."""
    for place, concurrency in enumerate(plan.concurrency):
        seed = number * len(plan.concurrency) + place
        trace = conversations.make(plan.shape, seed)
        file = folder / f"trace-{seed}.jsonl"
        conversations.write(trace, file)
        dataset = [
            "--dataset-name", "timed_trace", "--dataset-path", str(file), "--no-self-timed",
            "--timed-trace-chunk-hash-size", str(prompts.BLOCK),
        ]  # fmt: skip
        yield f"serve {concurrency} at once", dataset, concurrency, len(trace)
    for length in plan.random_tokens:
        concurrency = plan.concurrency[-1]
        dataset = [
            "--dataset-name", "random", "--random-input-len", str(length), "--random-output-len", str(RANDOM_ANSWER),
            "--seed", str(number), "--ignore-eos",
        ]  # fmt: skip
        yield f"serve {concurrency} at once, {length:,} random", dataset, concurrency, 2 * concurrency


def _rows(cell: str, found: dict[str, float]) -> Iterator[dict[str, Any]]:
    for clock, unit, key in METRICS:
        yield {"cell": cell, "clock": clock, "unit": unit, "values": [round(found[key], 3)]}
    yield {"cell": cell, "clock": "cached", "unit": "%", "values": [round(found["cached"], 1)]}


def replay(model: str, server: Any, dataset: list[str], requests: int, concurrency: int, out: Path) -> dict[str, float]:
    """What `vllm bench serve` says of one replay, and under `cached` the percentage of prompt tokens found cached.

    Raises:
        RuntimeError: it failed, or a request did.
    """
    command = [
        *VLLM, "bench", "serve", "--backend", "openai", "--base-url", server.url, "--model", model,
        "--tokenizer", model, *dataset, "--num-prompts", str(requests), "--max-concurrency", str(concurrency),
        "--temperature", "0", "--metric-percentiles", "50,90,99",
        "--save-result", "--result-dir", str(out.parent), "--result-filename", out.name, "--disable-tqdm",
    ]  # fmt: skip
    # The client draws a block's words from the hash of its name, which Python salts anew in every process.
    environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}
    before = _hits(server)
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=BENCH_LIMIT
    )
    if done.returncode:
        raise RuntimeError(f"{done.stdout}\nvllm bench serve ended with status {done.returncode}.")
    result = json.loads(out.read_text())
    if result["completed"] != requests:
        raise RuntimeError(f"{done.stdout}\nOnly {result['completed']} of {requests} requests were answered.")
    hit, asked = (after - earlier for after, earlier in zip(_hits(server), before, strict=True))
    return result | {"cached": 100 * hit / max(asked, 1)}


def flags(options: dict[str, Any]) -> list[str]:
    """Options of `vllm.LLM` as flags of `vllm serve`."""
    found = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            found += [f"--{flag}", json.dumps(value) if isinstance(value, dict | list) else str(value)]
    return found


def _hits(server: Any) -> tuple[float, float]:
    """Prompt tokens found in the prefix cache, and all that were looked for, since the server started."""
    return server.metric("vllm:prefix_cache_hits_total"), server.metric("vllm:prefix_cache_queries_total")


def _server_module() -> ModuleType:
    """The tests' server, by its path: another package may be installed under the name `tests`."""
    spec = importlib.util.spec_from_file_location("msa_tests_server", Path(__file__).parents[2] / "tests" / "server.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
