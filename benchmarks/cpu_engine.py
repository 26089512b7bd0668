"""Time to read a prompt and say its first token on a CPU: vLLM with msa-backend beside ``transformers``, one run.

    python benchmarks/cpu_engine.py [MODEL]      # a checkpoint of `msa-backend tiny` if none is named

``transformers`` is the only other implementation of MiniMax-M3 that runs on a CPU. Both compute in fp32 on all cores
and read the prompt in chunks of 2,048 tokens; medians of alternating runs after one warm-up.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

LENGTHS = (500, 2000, 6000, 20000)
CHUNK = 2048
RUNS = 3


def first_token_by_transformers(model: Path) -> Callable[[list[int]], int]:
    import torch
    from transformers import DynamicCache, MiniMaxM3SparseForConditionalGeneration

    loaded = MiniMaxM3SparseForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval()

    @torch.no_grad()
    def run(prompt: list[int]) -> int:
        cache = DynamicCache(config=loaded.config.get_text_config())
        for start in range(0, len(prompt), CHUNK):
            ids = torch.tensor([prompt[start : start + CHUNK]])
            output = loaded(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        return int(output.logits[0, -1].argmax())

    return run


def first_token_by_vllm(model: Path) -> Callable[[list[int]], int]:
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    llm = LLM(
        str(model),
        attention_backend="msa",
        language_model_only=True,
        dtype="float32",
        max_model_len=max(LENGTHS) + 128,
        max_num_batched_tokens=CHUNK,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=2**30,
    )
    sampling = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)

    def run(prompt: list[int]) -> int:
        (output,) = llm.generate([TokensPrompt(prompt_token_ids=prompt)], sampling, use_tqdm=False)
        return output.outputs[0].token_ids[0]

    return run


def seconds(run: Callable[[list[int]], int], prompt: list[int]) -> float:
    started = time.perf_counter()
    run(prompt)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    model = parser.parse_args().model
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if model is None:
        from msa_backend.tiny import write_tiny_checkpoint

        model = write_tiny_checkpoint(Path(tempfile.mkdtemp()) / "tiny")

    import torch

    ours, theirs = first_token_by_vllm(model), first_token_by_transformers(model)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; seconds to the first token, fp32\n")
    print(f"{'prompt tokens':>14}{'vLLM + msa':>12}{'transformers':>14}{'ratio':>8}{'same token':>12}")
    for length in LENGTHS:
        prompt = torch.randint(0, 1000, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        same = ours(prompt) == theirs(prompt)
        times = [(seconds(ours, prompt), seconds(theirs, prompt)) for _ in range(RUNS)]
        mine, other = (median(column) for column in zip(*times, strict=True))
        print(f"{length:>14}{mine:>12.2f}{other:>14.2f}{other / mine:>8.1f}{same!s:>12}", flush=True)


if __name__ == "__main__":
    main()
