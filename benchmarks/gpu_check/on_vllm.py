"""The parts that run in vLLM, but for its tests and the published command."""

from __future__ import annotations

import json
from typing import Any

from gpu_check import models
from gpu_check.host import Host
from gpu_check.job import Job

AT_ONCE = 4
"""Engines of one job: what two big jobs leave of 16 cores starts in a minute, 17 engines at once take four."""
GIGABYTE = 1_000_000_000
FP8_KV: dict[str, Any] = {"kv_cache_dtype": "fp8"}
FP8_INDEX: dict[str, Any] = {"attention_config": {"indexer_kv_dtype": "fp8"}}
PLAIN: dict[str, Any] = {"kv_cache_dtype": "auto", "attention_config": {}}


def room(gigabytes: float) -> dict[str, Any]:
    """Options of an engine that leaves others theirs: a cache of so many gigabytes.

    vLLM compares the share of the GPU's memory with what is free even where the cache's size is given.
    """
    return {"gpu_memory_utilization": 0.02, "kv_cache_memory_bytes": int(gigabytes * GIGABYTE)}


SMALL = room(3) | {"max_num_seqs": 16, "max_num_batched_tokens": 4096, "max_cudagraph_capture_size": 64}
TINY = SMALL | room(1) | {"dtype": "bfloat16", "max_num_batched_tokens": 2048}


def caches(host: Host) -> list[Job]:
    """fp8 for K and V and for index keys, each and both, beside bf16, and beside in-tree's class."""
    also = {
        "bf16": ("ours", PLAIN),
        "in-tree-bf16": ("in-tree", PLAIN),
        "kv-only": ("ours", FP8_KV | {"attention_config": {}}),
        "index-only": ("ours", {"kv_cache_dtype": "auto"}),
    }
    return [equal(host, "caches", "bf16", SMALL | FP8_KV | FP8_INDEX, also)]


def mxfp8(host: Host) -> list[Job]:
    return [equal(host, "mxfp8", "mxfp8", SMALL)]


def fp8(host: Host) -> list[Job]:
    """Weights in blocks of fp8."""
    return [equal(host, "fp8", "fp8", SMALL)]


def mtp(host: Host) -> list[Job]:
    """3 drafts of an MTP module and 7, of n-grams, and none."""
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    also = {
        "no-drafts": ("ours", speculation(None)),
        "n-gram": ("ours", speculation(ngram)),
        "mtp-7": ("ours", speculation({"method": "mtp", "num_speculative_tokens": 7})),
    }
    three = speculation({"method": "mtp", "num_speculative_tokens": 3})
    return [equal(host, "mtp", "drafts/mtp", TINY | three, also, classes="ours", length=8192)]


def eagle3(host: Host) -> list[Job]:
    """Drafts of a Llama, with in-tree's class too, and none."""
    drafts = speculation(eagle3_options(host, "drafts/eagle3-draft"))
    also = {"no-drafts": ("ours", speculation(None))}
    return [equal(host, "eagle3", "drafts/eagle3", TINY | drafts, also, length=8192)]


def serve(host: Host) -> list[Job]:
    """What a client sees of both classes, plain."""
    options = room(18) | {"block_size": 128, "enable_prefix_caching": True}
    return [served(host, "serve", "bf16-20", options)]


def speculation(options: dict[str, Any] | None) -> dict[str, Any]:
    return {"speculative_config": options}


def eagle3_options(host: Host, draft: str) -> dict[str, Any]:
    return {
        "method": "eagle3",
        "model": str(host.model(draft)),
        "num_speculative_tokens": 3,
        "attention_backend": "FLASH_ATTN",
    }


def equal(
    host: Host,
    name: str,
    model: str,
    options: dict[str, Any],
    also: dict[str, tuple[str, dict[str, Any]]] | None = None,
    classes: str = "ours,in-tree",
    length: int = 40_000,
) -> Job:
    """Log-probabilities and answers of the classes, of ours without graphs, and of those in `also`."""
    more = [word for key, (of, its) in (also or {}).items() for word in ("--also", f"{key}={of}{json.dumps(its)}")]
    lengths = "4000,32000" if length > 32_000 else "300,1500,3000,6000"
    words = [
        "run", host.model(model), host.result(f"vllm-{name}"), "--only", "equal", "--at-once", AT_ONCE,
        "--classes", classes, "--max-model-len", length, "--lengths", lengths, "--options", options, *more,
    ]  # fmt: skip
    return job(host, name, host.benchmark("vllm", *words), after=model.partition("/")[0], engines=AT_ONCE)


def served(host: Host, name: str, model: str, options: dict[str, Any]) -> Job:
    """`vllm bench serve` on both classes."""
    words = [
        "run", host.model(model), host.result(f"vllm-{name}"), "--only", "serve", "--max-model-len", 65_536,
        "--concurrency", "1,8", "--conversations", 16, "--turns", 6, "--random", 32_768, "--rounds", 2,
        "--options", options,
    ]  # fmt: skip
    return job(host, name, host.benchmark("vllm", *words), after=model, timed=True, tail=40)


def job(host: Host, name: str, command: tuple[str, ...], after: str, **how: Any) -> Job:
    return Job(f"vllm-{name}", f"vllm:{name}", command, host.environment("vllm"), after=(models.job(after),), **how)
