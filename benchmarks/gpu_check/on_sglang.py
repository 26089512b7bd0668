"""The parts that run in SGLang, but for its tests."""

from __future__ import annotations

from typing import Any

from gpu_check import models
from gpu_check.host import Host
from gpu_check.job import Job

ALL: dict[str, Any] = {"max_running_requests": 64, "watchdog_timeout": 120}
SHARED = ALL | {"mem_fraction_static": 0.9}
"""Of engines that run beside each other: their caches have a given size, below which SGLang keeps."""
TINY = SHARED | {"max_total_tokens": 65_536}
CLASSES = ("ours", "in-tree")


def truth(host: Host) -> list[Job]:
    """Is it right? Beside `transformers` in fp32: ours, SGLang's own, ours without graphs."""
    return [_truth(host, "truth", ("ours", "in-tree", "eager"), {"chunked_prefill_size": 1024})]


def fp8(host: Host) -> list[Job]:
    """The same with caches in e4m3."""
    return [_truth(host, "fp8", CLASSES, {"kv_cache_dtype": "fp8_e4m3"})]


def equal(host: Host) -> list[Job]:
    """Log-probabilities of the classes and of ours without graphs, hits against misses."""
    words = ("--only", "equal", "--at-once", 3, "--max-model-len", 140_000, "--lengths", "500,3000,20000")
    return [_run(host, "equal", "equal", words, SHARED | {"max_total_tokens": 131_072}, engines=3)]


def quick(host: Host) -> list[Job]:
    """A few cells of both classes, and the kernels of a step."""
    words = (
        "--only", "cells,profile", "--max-model-len", 140_000, "--contexts", "4096,32768,131072", "--suffixes", "171",
        "--batches", "1,8", "--repeats", 3, "--gpu-steps", 0, "--window-ms", 100, "--profile-contexts", 4096,
        "--profile-batches", 1, "--profile-new", 171, "--profile-steps", 8,
    )  # fmt: skip
    return [_run(host, "quick", "quick", words, ALL, timed=True, tail=60)]


def profile(host: Host) -> list[Job]:
    """Kernels and GPU time of a decode step, a suffix and a chunk."""
    words = (
        "--only", "profile", "--max-model-len", 140_000, "--profile-contexts", "4096,131072", "--profile-batches",
        "1,32", "--profile-new", "171,8192", "--profile-steps", 10,
    )  # fmt: skip
    return [_run(host, "profile", "profile", words, ALL, timed=True, tail=60)]


def full(host: Host) -> list[Job]:
    """Every cell; a job for each class, since one alone may fill the time. `benchmarks/engine table` joins them."""
    words = (
        "--only", "cells", "--max-model-len", 524_288, "--contexts", "4096,32768,131072,500000",
        "--suffixes", "64,171,512,2048", "--batches", "1,8,32", "--repeats", 3, "--gpu-steps", 4, "--window-ms", 150,
        "--seconds", 420,
    )  # fmt: skip
    return [
        _run(host, "full", f"full-{name}", (*words, "--classes", name), ALL, timed=True, tail=40) for name in CLASSES
    ]


def _truth(host: Host, name: str, classes: tuple[str, ...], options: dict[str, Any]) -> Job:
    words = (
        "--only", "truth", "--truth", models.truth(host) / "truth.json", "--classes", ",".join(classes),
        "--at-once", len(classes), "--max-model-len", 8192,
    )  # fmt: skip
    return _run(host, name, name, words, TINY | options, model="tiny", engines=len(classes), tail=30)


def _run(
    host: Host, part: str, name: str, words: tuple[Any, ...], options: dict[str, Any], model: str = "sglang", **how: Any
) -> Job:
    folder = models.truth(host) / "tiny" if model == "tiny" else host.model(model)
    command = host.benchmark(
        "sglang", "run", folder, host.result(f"sglang-{name}"), "--engine", "sglang", *words, "--options", options
    )
    if model == "tiny":
        after = () if host.truth else (models.job("truth"),)
    else:
        after = (models.job(model),)
    return Job(f"sglang-{name}", f"sglang:{part}", command, host.environment("sglang"), after=after, **how)
