"""The command that the public benchmark fleets run M3 on Hopper with, and that command taken apart.

On 2026-11-22 ours with all of it, MXFP8 weights, fp8 K and V, EAGLE3 drafts and synthetic acceptance, died on an H200
in its second verify step: `vllm serve` answered one request of 16,555 tokens with four tokens, then with status 500.
vLLM's own class lived, and so did each feature by itself. The likely cause, graphs of the draft that had other shapes
than the target's, was found by reading and is mended (docs/kernels.md). Should it die again, every part is asked for
alone: with graphs, as it died, and without them and one kernel at a time, so that the log names the kernel.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpu_check import models
from gpu_check.host import Host
from gpu_check.job import Job
from gpu_check.on_vllm import FP8_KV, eagle3_options, job, room, served, speculation

SYNTHETIC = {"rejection_sample_method": "synthetic", "synthetic_acceptance_length": 2.78}
SEQUENCES = {"max_num_seqs": 20, "max_cudagraph_capture_size": 80}
CACHING = {"block_size": 128, "enable_prefix_caching": True}
SERVER = {
    "enable_prompt_tokens_details": True,
    "default_chat_template_kwargs": {"thinking_mode": "enabled"},
    "tool_call_parser": "minimax_m3",
    "reasoning_parser": "minimax_m3",
    "enable_auto_tool_choice": True,
}
SUBSETS = (
    ("mxfp8", "kv", "eagle3", "synthetic"),
    ("kv", "eagle3", "synthetic"),
    ("mxfp8", "eagle3", "synthetic"),
    ("mxfp8", "kv", "eagle3"),
    ("mxfp8", "kv"),
    ("kv", "eagle3"),
    ("eagle3", "synthetic"),
)
"""All, all but one, and the pairs of which one was left."""


def fleet(host: Host) -> list[Job]:
    """The whole command at one rank, both classes, timed."""
    return [served(host, "fleet", "mxfp8-20", fleet_options(host))]


def fleet_options(host: Host) -> dict[str, Any]:
    """Of the command, but for the ranks."""
    drafts = speculation(eagle3_options(host, "draft-20") | SYNTHETIC)
    return room(10) | FP8_KV | SEQUENCES | CACHING | SERVER | drafts


def parts(host: Host) -> list[Job]:
    """An engine for each subset, with graphs; and without, each kernel waited for."""
    return [one for subset in SUBSETS for one in (_engine(host, subset, True), _engine(host, subset, False))]


def options(host: Host, subset: tuple[str, ...], graphs: bool) -> dict[str, Any]:
    """Of `vllm.LLM`."""
    found = {"model": str(host.model("mxfp8" if "mxfp8" in subset else "bf16")), "language_model_only": True}
    found |= room(3) | SEQUENCES | CACHING | {"max_model_len": 65_536}
    if "kv" in subset:
        found |= FP8_KV
    if "eagle3" in subset:
        drafts = eagle3_options(host, "bf16-draft")
        found |= speculation(drafts | SYNTHETIC if "synthetic" in subset else drafts)
    return found if graphs else found | {"enforce_eager": True}


def _engine(host: Host, subset: tuple[str, ...], graphs: bool) -> Job:
    name = "-".join(("fleet", *subset, "graphs" if graphs else "eager"))
    command = (
        host.pythons["vllm"], str(Path(__file__).with_name("ask.py")), json.dumps(options(host, subset, graphs))
    )  # fmt: skip
    one = job(host, name, command, after="mxfp8" if "mxfp8" in subset else "bf16", tail=1)
    # The draft is written with the model in bf16.
    after = tuple(dict.fromkeys((*one.after, models.job("bf16"))))
    blocking = {} if graphs else {"CUDA_LAUNCH_BLOCKING": "1"}
    return replace(one, part="vllm:fleet-parts", after=after, environment={**one.environment, **blocking})
