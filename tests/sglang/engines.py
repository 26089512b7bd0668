"""Engines under test, and what is asked of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from ..compare import Answer, PromptIds
from ..server import Server, running

ENVIRONMENT = {
    # Without this SGLang looks for a GPU, whatever its options say.
    "SGLANG_USE_CPU_ENGINE": "1",
    "HF_HUB_OFFLINE": "1",
    # The tensors of a tiny model are too small to share, and another engine runs beside this one.
    "OMP_NUM_THREADS": "1",
}


@contextmanager
def engine(model: Path, **options: Any) -> Iterator[Any]:
    """An SGLang engine with the plugin, in fp32 on the CPU unless told otherwise."""
    os.environ.update(ENVIRONMENT)
    from sglang import Engine

    defaults = {
        "attention_backend": "msa",
        "device": "cpu",
        "dtype": "float32",
        "context_length": 8192,
        "max_total_tokens": 32768,
        "chunked_prefill_size": 8192,
        "disable_cuda_graph": True,
        "disable_radix_cache": True,
        "skip_tokenizer_init": True,
        "log_level": "warning",
        "random_seed": 0,
    }
    llm = Engine(model_path=str(model), **(defaults | options))
    try:
        yield llm
    finally:
        llm.shutdown()


def ask(llm: Any, prompts: Sequence[PromptIds], max_tokens: int, prompt_logprobs: bool = False) -> list[Answer]:
    """The greedy continuation of each prompt, ``max_tokens`` long; asked for together."""
    return [read(output, prompt_logprobs) for output in generate(llm, prompts, max_tokens, prompt_logprobs)]


def generate(llm: Any, prompts: Sequence[PromptIds], max_tokens: int, prompt_logprobs: bool = False) -> list[Any]:
    """What SGLang returns for each prompt."""
    return llm.generate(
        input_ids=[list(prompt) for prompt in prompts],
        sampling_params={"temperature": 0, "max_new_tokens": max_tokens, "ignore_eos": True},
        return_logprob=True,
        logprob_start_len=0 if prompt_logprobs else -1,
    )


def read(output: Mapping[str, Any], prompt_logprobs: bool = False) -> Answer:
    """One answer of SGLang's own interface, which is the same in process and over HTTP."""
    meta = output["meta_info"]
    said = meta["output_token_logprobs"]
    # The first token of a prompt follows nothing.
    before = [entry[0] for entry in meta["input_token_logprobs"][1:]] if prompt_logprobs else []
    return Answer([entry[1] for entry in said], [entry[0] for entry in said], before, meta["cached_tokens"])


def started(model: Path, flags: Sequence[str], **environment: str) -> AbstractContextManager[Server]:
    """``python -m sglang.launch_server`` on the CPU, in fp32."""
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", model]
    always = ["--device", "cpu", "--dtype", "float32", "--disable-cuda-graph"]
    return running(command, [*always, *flags], {**ENVIRONMENT, **environment})
