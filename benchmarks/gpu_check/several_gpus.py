"""The parts that need two GPUs of one host."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpu_check.fleet import fleet_options
from gpu_check.host import REPOSITORY, Host
from gpu_check.job import Job
from gpu_check.on_vllm import FP8_INDEX, FP8_KV, SMALL, equal, job, room, served

RANKS = 2
TWO = {"tensor_parallel_size": RANKS}
SHARED = {"environment": {"MSA_SHARED_SCORING": "1"}}
"""Ranks share the scoring of blocks in every step."""
OTHER_WAYS = {
    "experts": TWO | {"enable_expert_parallel": True},
    "stages": {"pipeline_parallel_size": RANKS},
}
"""Of using two GPUs, that merely have to live; refused until they do."""


def ranks(host: Host) -> list[Job]:
    """Two ranks beside one and beside in-tree's, sharing the scoring of blocks, and with fp8 caches."""
    also = {
        "one-rank": ("ours", {"tensor_parallel_size": 1}),
        "shared": ("ours", SHARED),
        "fp8-caches": ("ours", FP8_KV | FP8_INDEX),
    }
    return [_two(equal(host, "x2-ranks", "bf16", SMALL | TWO, also))]


def other_ways(host: Host) -> list[Job]:
    """Does an engine answer with each?"""
    found = []
    for name, options in OTHER_WAYS.items():
        asked: dict[str, Any] = {"model": str(host.model("bf16")), "language_model_only": True, "max_model_len": 40_000}
        script = str(Path(__file__).with_name("ask.py"))
        command = host.pythons["vllm"], script, json.dumps(asked | SMALL | options)
        found.append(replace(_two(job(host, f"x2-{name}", command, after="bf16", tail=1)), part="vllm-x2:other-ways"))
    return found


def scoring(host: Host) -> list[Job]:
    """What sharing the scoring saves and what the exchanges cost; a rank's part for 4 and 8 ranks on one GPU."""
    script, python = str(REPOSITORY / "benchmarks" / "shared_scoring.py"), host.pythons["vllm"]
    exchanged = (python, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS), script)
    commands = {"x2-scoring": exchanged, "x2-scoring-parts": (python, script)}
    return [
        Job(
            f"vllm-{name}", "vllm-x2:scoring", (*command, "--json", str(host.result(f"vllm-{name}"))),
            host.environment("vllm"), timed=True, tail=40,
        )
        for name, command in commands.items()
    ]  # fmt: skip


def serve(host: Host) -> list[Job]:
    """What a client sees of both classes at two ranks, plain and with the published command."""
    plain = room(18) | TWO | {"block_size": 128, "enable_prefix_caching": True}
    runs = (served(host, "x2-serve", "bf16-20", plain), served(host, "x2-fleet", "mxfp8-20", fleet_options(host) | TWO))
    return [replace(run, part="vllm-x2:serve") for run in runs]


def _two(one: Job) -> Job:
    """An engine of two ranks is two processes."""
    return replace(one, part=one.part.replace("vllm:x2-", "vllm-x2:"), engines=RANKS * one.engines)
