"""Is a served model right? Compare vLLM's log-probabilities with ``transformers``', where both cannot run together.

Two steps, because the machine with the GPU may not have a ``transformers`` that knows MiniMax-M3:

    python benchmarks/engine_check.py truth MODEL truth.json           # on any CPU, minutes
    python benchmarks/engine_check.py check MODEL truth.json           # where vLLM runs; prints JSON
    MSA_DISABLE=1 python benchmarks/engine_check.py check ...          # the same for vLLM's own M3 class

The truth is computed in fp32 from the checkpoint's weights, whatever dtype they are in.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

LENGTHS = (1, 100, 128, 129, 700, 1500, 2049, 4000, 6000)
NEW_TOKENS = 16
CHUNK = 1024


def write_truth(model: Path, file: Path) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from tests import oracle

    reference = oracle.load(model)
    prompts = [oracle.random_prompt(length, seed=9) for length in LENGTHS]
    entries = []
    for prompt in prompts:
        answer = oracle.greedy(reference, prompt, NEW_TOKENS)
        read = oracle.prompt_logprobs(reference, prompt).tolist() if len(prompt) > 1 else []
        entries.append({"prompt": prompt, "prompt_logprobs": read, "tokens": answer.tokens, "margins": answer.margins})
    file.write_text(json.dumps(entries))


def check(model: Path, file: Path, dtype: str, options: dict[str, Any]) -> dict[str, Any]:
    import torch
    import vllm
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    truth = json.loads(file.read_text())
    started = time.monotonic()
    llm = LLM(
        str(model),
        dtype=dtype,
        language_model_only=True,
        max_model_len=8192,
        max_num_batched_tokens=CHUNK,
        enable_prefix_caching=True,
        **options,
    )
    start_seconds = time.monotonic() - started
    prompts = [TokensPrompt(prompt_token_ids=entry["prompt"]) for entry in truth]
    # The first pass computes all prompts together in chunks; it asks for their log-probabilities, which makes vLLM
    # pass the prefix cache by. The second pass takes the prompts from the cache.
    reading = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, prompt_logprobs=0, logprobs=0)
    cold = llm.generate(prompts, reading, use_tqdm=False)
    hit = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True), use_tqdm=False)

    errors = []
    for entry, output in zip(truth, cold, strict=True):
        steps = zip(output.prompt_logprobs[1:], entry["prompt"][1:], entry["prompt_logprobs"], strict=True)
        errors += [abs(step[token].logprob - true) for step, token, true in steps]
    sizes = torch.tensor(errors)
    same = [list(output.outputs[0].token_ids) == entry["tokens"] for entry, output in zip(truth, cold, strict=True)]
    same_hit = [
        list(output.outputs[0].token_ids) == list(first.outputs[0].token_ids)
        for output, first in zip(hit, cold, strict=True)
    ]
    cuda = torch.cuda.is_available()
    return {
        "model_class": "vLLM in-tree" if os.environ.get("MSA_DISABLE") == "1" else "msa-backend",
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
        "dtype": dtype,
        "options": {key: str(value) for key, value in options.items()},
        "start_seconds": round(start_seconds, 1),
        "prompt_tokens_compared": len(errors),
        "logprob_error": {
            "mean": sizes.mean().item(),
            "median": sizes.median().item(),
            "p99": sizes.quantile(0.99).item(),
            "max": sizes.max().item(),
        },
        "answers_equal_to_truth": f"{sum(same)} of {len(same)}",
        "answers_equal_after_prefix_hit": f"{sum(same_hit)} of {len(same_hit)}",
        "prefix_tokens_hit": sum(output.num_cached_tokens or 0 for output in hit),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["truth", "check"])
    parser.add_argument("model", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--options", type=json.loads, default={}, help="more arguments of vllm.LLM, as JSON")
    arguments = parser.parse_args()
    if arguments.step == "truth":
        write_truth(arguments.model, arguments.file)
    else:
        print(json.dumps(check(arguments.model, arguments.file, arguments.dtype, arguments.options), indent=2))


if __name__ == "__main__":
    main()
