"""The checkpoints that parts are run on, each written once, and only if a part that was asked for needs it."""

from __future__ import annotations

from pathlib import Path

from gpu_check.host import Host
from gpu_check.job import Job

SMALL = 6
"""Layers where nothing is timed: in MXFP8 they take 30 s to write, in bf16 18."""
OF_SGLANG = 8
HERE = Path(__file__).resolve().parent


def jobs(host: Host) -> list[Job]:
    """One for each checkpoint; `job(NAME)` is what waits for it."""

    def written(name: str, *words: object, engine: str = "vllm") -> Job:
        command = host.benchmark(engine, "write", host.model(name), *words)
        return Job(job(name), "models", command, host.environment(engine))

    def by_script(name: str, engine: str) -> Job:
        command = (host.pythons[engine], str(HERE / f"write_{name}.py"), str(host.model(name)))
        return Job(job(name), "models", command, host.environment(engine))

    return [
        written("bf16", "--layers", SMALL, "--cache-scales", "--draft", host.model("bf16-draft")),
        written("mxfp8", "--layers", SMALL, "--quantization", "mxfp8", "--cache-scales"),
        written("fp8", "--layers", SMALL, "--quantization", "fp8"),
        by_script("drafts", "vllm"),
        written("bf16-20"),
        written("mxfp8-20", "--quantization", "mxfp8", "--cache-scales", "--draft", host.model("draft-20")),
        written("sglang", "--layers", OF_SGLANG, engine="sglang"),
        by_script("truth", "sglang"),
    ]


def job(name: str) -> str:
    return f"model-{name}"


def truth(host: Host) -> Path:
    """The folder with `tiny/` and `truth.json`."""
    return host.truth or host.model("truth")
