"""What a client sees: `vllm serve` under `vllm bench serve`, on conversations whose prompts are almost all cached."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from engine import conversations, prompts

# Not the script `vllm`: where vLLM was laid in place by hand there is none.
VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")
START_LIMIT = 600  # seconds
BENCH_LIMIT = 1800
METRICS = (
    ("output", "tokens/s", "output_throughput"),
    ("total", "tokens/s", "total_token_throughput"),
    ("TTFT p50", "ms", "median_ttft_ms"),
    ("TTFT p99", "ms", "p99_ttft_ms"),
    ("TPOT p50", "ms", "median_tpot_ms"),
    ("TPOT p99", "ms", "p99_tpot_ms"),
)


@dataclass(frozen=True)
class Plan:
    """What to replay.

    Attributes:
        concurrency: requests under way at once; one replay each, of a trace of its own.
        shape: of the conversations.
    """

    concurrency: tuple[int, ...]
    shape: conversations.Shape


def measure(
    model: str, options: dict[str, Any], plan: Plan, environment: dict[str, str], folder: Path
) -> Iterator[dict[str, Any]]:
    """Rows `cell, clock, unit, values` of one server.

    Args:
        options: of `vllm.LLM`, passed as flags.
        environment: of the server, beside this process's.
        folder: where traces and results of the client are written.

    Raises:
        RuntimeError: the server did not start or a replay failed; the message has what was printed.
    """
    with _server_module().running([*VLLM, "serve", model], flags(options), environment, START_LIMIT) as server:
        for seed, concurrency in enumerate(plan.concurrency):
            trace = conversations.make(plan.shape, seed)
            file = folder / f"trace-{seed}.jsonl"
            conversations.write(trace, file)
            before = _hits(server)
            result = replay(model, server.url, file, len(trace), concurrency, folder / f"bench-{seed}.json")
            hit, asked = (after - earlier for after, earlier in zip(_hits(server), before, strict=True))
            cell = f"serve {concurrency} at once"
            for clock, unit, key in METRICS:
                yield {"cell": cell, "clock": clock, "unit": unit, "values": [round(result[key], 3)]}
            yield {"cell": cell, "clock": "cached", "unit": "%", "values": [round(100 * hit / max(asked, 1), 1)]}


def replay(model: str, url: str, trace: Path, requests: int, concurrency: int, out: Path) -> dict[str, Any]:
    """What `vllm bench serve` says of one replay.

    Raises:
        RuntimeError: it failed, or a request did.
    """
    command = [
        *VLLM, "bench", "serve", "--backend", "openai", "--base-url", url, "--model", model, "--tokenizer", model,
        "--dataset-name", "timed_trace", "--dataset-path", str(trace), "--no-self-timed",
        "--timed-trace-chunk-hash-size", str(prompts.BLOCK), "--num-prompts", str(requests),
        "--max-concurrency", str(concurrency), "--temperature", "0", "--metric-percentiles", "50,90,99",
        "--save-result", "--result-dir", str(out.parent), "--result-filename", out.name, "--disable-tqdm",
    ]  # fmt: skip
    # The client draws a block's words from the hash of its name, which Python salts anew in every process.
    environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=BENCH_LIMIT
    )
    if done.returncode:
        raise RuntimeError(f"{done.stdout}\nvllm bench serve ended with status {done.returncode}.")
    result = json.loads(out.read_text())
    if result["completed"] != requests:
        raise RuntimeError(f"{done.stdout}\nOnly {result['completed']} of {requests} requests were answered.")
    return result


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
