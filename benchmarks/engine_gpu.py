"""Our model class and vLLM's own in the same engine on one GPU: do they say the same, and how fast?

    python benchmarks/engine_gpu.py write MODEL              # a checkpoint of 8 layers with the released attention
    python benchmarks/engine_gpu.py run MODEL ours.json      # each in a process of its own, one after the other
    MSA_DISABLE=1 python benchmarks/engine_gpu.py run MODEL in-tree.json
    MSA_DISABLE=1 python benchmarks/engine_gpu.py run MODEL eager.json --options '{"enforce_eager": true}' --only equal
    python benchmarks/engine_gpu.py compare ours.json in-tree.json eager.json

Both read the same files, so the weights are the same. Both run in bf16 with vLLM's defaults but for the lengths below.
A long prompt takes ten thousands of decisions, which blocks and which experts, and bf16 rounding turns some: two right
implementations differ by a little almost everywhere and by much in a few places. So differences are compared by their
distribution: over the first 2,047 tokens, where every block is taken and nothing but rounding is left, and over the
rest. Rounding alone does not shift the mean.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

EQUAL_LENGTHS = (4_000, 32_000, 128_000)
SPEED_LENGTHS = (4_096, 32_768, 131_072, 500_000)
DENSE_TOKENS = 16 * 128 - 1
SUFFIX = 171  # new tokens after a prefix hit: what one turn of an agent adds
REPEATS = 3
NEW_TOKENS = 16
DECODE_TOKENS = 513
MAX_MODEL_LEN = 524_288


def write(model: Path) -> None:
    from msa_backend.tiny import write_tiny_checkpoint
    from msa_backend.tiny.shape import TinyShape

    sparse = (False,) + (True,) * 7
    shape = TinyShape(
        hidden=3072, heads=64, kv_heads=4, topk=16, experts=16, experts_per_token=4, expert_size=1024, dense_size=6144,
        sparse_attention=sparse, moe=sparse, max_positions=1_048_576,
    )  # fmt: skip
    write_tiny_checkpoint(model, dtype="bfloat16", shards=4, shape=shape, overwrite=True)


def prompt(length: int, seed: int) -> Any:
    import random

    from vllm.inputs import TokensPrompt

    # The first 256 tokens of the tiny tokenizer's vocabulary are bytes; words follow.
    return TokensPrompt(prompt_token_ids=random.Random(f"{length}:{seed}").choices(range(256, 1000), k=length))


def longer(base: Any, seed: int) -> Any:
    return {"prompt_token_ids": base["prompt_token_ids"] + prompt(SUFFIX, seed)["prompt_token_ids"]}


def run(model: Path, only: str | None, options: dict[str, Any]) -> dict[str, Any]:
    import torch
    import vllm

    started = time.monotonic()
    llm = vllm.LLM(
        str(model),
        dtype="bfloat16",
        language_model_only=True,
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=8192,
        max_num_seqs=64,
        enable_prefix_caching=True,
        gpu_memory_utilization=0.9,
        disable_log_stats=False,
        **options,
    )
    report: dict[str, Any] = {
        "model_class": "vLLM in-tree" if os.environ.get("MSA_DISABLE") == "1" else "msa-backend",
        "device": torch.cuda.get_device_name(),
        "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
        "options": options,
        "start_seconds": round(time.monotonic() - started, 1),
    }
    for name, measure in (("equal", equal), ("speed", speed)):
        if only in (None, name):
            report[name] = measure(llm)
    return report


def equal(llm: Any) -> dict[str, Any]:
    """The log-probability of every prompt token and of a greedy answer, cold and after a prefix hit."""
    from vllm import SamplingParams

    reading = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, prompt_logprobs=0, logprobs=0)
    answering = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=0)
    entries = {}
    for length in EQUAL_LENGTHS:
        tokens = prompt(length, seed=0)
        # Asked for the prompt's log-probabilities, vLLM passes the prefix cache by; the second request fills it
        # with all but the suffix, and the third starts from there.
        (cold,) = llm.generate([tokens], reading, use_tqdm=False)
        llm.generate([tokens], answering, use_tqdm=False)
        (hit,) = llm.generate([longer(tokens, seed=0)], answering, use_tqdm=False)
        (miss,) = llm.generate([longer(tokens, seed=0)], reading, use_tqdm=False)
        entries[str(length)] = {
            "prompt": [
                step[token].logprob
                for step, token in zip(cold.prompt_logprobs[1:], tokens["prompt_token_ids"][1:], strict=True)
            ],
            "cold": answer(cold),
            "hit": answer(hit) | {"cached_tokens": hit.num_cached_tokens},
            "miss": answer(miss),
        }
    return entries


def answer(output: Any) -> dict[str, Any]:
    completion = output.outputs[0]
    tokens = list(completion.token_ids)
    logprobs = [step[token].logprob for step, token in zip(completion.logprobs, tokens, strict=True)]
    return {"tokens": tokens, "logprobs": logprobs}


def speed(llm: Any) -> dict[str, Any]:
    """Seconds to the first token, cold and with a suffix after a hit, and each token after it; of two, the lower."""
    from vllm import SamplingParams

    def ask(tokens: Any, new: int) -> tuple[float, Any]:
        sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        started = time.monotonic()
        (output,) = llm.generate([tokens], sampling, use_tqdm=False)
        return time.monotonic() - started, output

    entries: dict[str, Any] = {}
    for length in SPEED_LENGTHS:
        repeats = REPEATS if length < 200_000 else 2
        cold, suffix, each = [], [], []
        for repeat in range(repeats):
            tokens = prompt(length, seed=1 + repeat)
            took, output = ask(tokens, 1)
            assert not output.num_cached_tokens, f"{output.num_cached_tokens} tokens were cached"
            cold.append(took)
            took, output = ask(longer(tokens, seed=1), 1)
            assert output.num_cached_tokens > length - 256, f"only {output.num_cached_tokens} tokens were cached"
            suffix.append(took)
            _, output = ask(tokens, DECODE_TOKENS)
            # By the engine's own clock: reading half a million token ids takes the host longer than many steps.
            each.append((output.metrics.last_token_ts - output.metrics.first_token_ts) / (DECODE_TOKENS - 1))
        entries[str(length)] = {
            "ttft_s": statistics.median_low(cold),
            "ttft_all_s": cold,
            "suffix_ttft_s": statistics.median_low(suffix),
            "decode_ms": 1e3 * statistics.median_low(each),
        }
    return entries


def compare(ours: dict[str, Any], in_tree: dict[str, Any], again: dict[str, Any] | None) -> dict[str, Any]:
    result: dict[str, Any] = {"equal": {}, "speed": {}}
    for length, entry in ours.get("equal", {}).items():
        theirs = in_tree["equal"][length]
        result["equal"][length] = {
            "prompt tokens": len(entry["prompt"]),
            "ours - in-tree": distances(entry["prompt"], theirs["prompt"]),
            "in-tree - in-tree again": distances(again["equal"][length]["prompt"], theirs["prompt"]) if again else None,
            "ours, answer": common(entry["cold"], theirs["cold"]),
            "in-tree again, answer": common(again["equal"][length]["cold"], theirs["cold"]) if again else None,
            "ours, hit against miss": common(entry["hit"], entry["miss"]) | {"cached": entry["hit"]["cached_tokens"]},
            "in-tree, hit against miss": common(theirs["hit"], theirs["miss"]),
        }
    for length, entry in ours.get("speed", {}).items():
        theirs = in_tree["speed"][length]
        result["speed"][length] = {
            name: {"ours": entry[name], "in-tree": theirs[name], "times as fast": theirs[name] / entry[name]}
            for name in ("ttft_s", "suffix_ttft_s", "decode_ms")
        }
    return result


def distances(some: list[float], others: list[float]) -> dict[str, dict[str, float]]:
    gaps = [a - b for a, b in zip(some, others, strict=True)]
    parts = {"all blocks taken": gaps[:DENSE_TOKENS], "blocks selected": gaps[DENSE_TOKENS:]}
    result = {}
    for name, part in ((name, part) for name, part in parts.items() if part):
        sizes = sorted(map(abs, part))
        at = {f"p{share}": sizes[len(sizes) * share // 100] for share in (50, 90, 99)}
        result[name] = {"mean": statistics.fmean(part), "mean size": statistics.fmean(sizes), **at, "max": sizes[-1]}
    return result


def common(some: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """How many tokens of two answers agree from the start, and how far their log-probabilities are apart there."""
    same = 0
    while same < len(some["tokens"]) and some["tokens"][same] == others["tokens"][same]:
        same += 1
    apart = [abs(a - b) for a, b in zip(some["logprobs"][:same], others["logprobs"][:same], strict=True)]
    return {"equal tokens": f"{same} of {len(some['tokens'])}", "largest distance": max(apart, default=None)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    writing = steps.add_parser("write")
    writing.add_argument("model", type=Path)
    running = steps.add_parser("run")
    running.add_argument("model", type=Path)
    running.add_argument("file", type=Path)
    running.add_argument("--only", choices=["equal", "speed"])
    running.add_argument("--options", type=json.loads, default={}, help="more arguments of vllm.LLM, as JSON")
    comparing = steps.add_parser("compare")
    comparing.add_argument("files", type=Path, nargs="+", help="ours, in-tree, and in-tree again")
    arguments = parser.parse_args()
    if arguments.step == "write":
        write(arguments.model)
    elif arguments.step == "run":
        report = run(arguments.model, arguments.only, arguments.options)
        arguments.file.write_text(json.dumps(report))
        print(json.dumps({key: value for key, value in report.items() if key != "equal"}, indent=1))
    else:
        read = [json.loads(file.read_text()) for file in arguments.files]
        print(json.dumps(compare(read[0], read[1], read[2] if len(read) > 2 else None), indent=1))


if __name__ == "__main__":
    main()
