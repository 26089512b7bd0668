"""Engines under test, and what is asked of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from ..compare import Answer, PromptIds
from ..server import Server, running


@contextmanager
def engine(model: Path, **options: Any) -> Iterator[Any]:
    """A vLLM engine with the plugin, in fp32 and eager mode unless told otherwise."""
    from vllm import LLM

    defaults = {
        "attention_backend": "msa",
        "language_model_only": True,
        "dtype": "float32",
        "max_model_len": 8192,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 2**30,
        "enable_prefix_caching": False,
        "seed": 0,
    }
    os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
    llm = LLM(str(model), **(defaults | options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def ask(llm: Any, prompts: Sequence[PromptIds], max_tokens: int, prompt_logprobs: bool = False) -> list[Answer]:
    """The greedy continuation of each prompt, ``max_tokens`` long."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    sampling = SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        ignore_eos=True,
        logprobs=0,
        prompt_logprobs=0 if prompt_logprobs else None,
        detokenize=False,
    )
    outputs = llm.generate([TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], sampling, use_tqdm=False)
    return [_answer(output) for output in outputs]


def _answer(output: Any) -> Answer:
    completion = output.outputs[0]
    tokens = list(completion.token_ids)
    said = [step[token].logprob for step, token in zip(completion.logprobs, tokens, strict=True)]
    read = [
        step[token].logprob
        for step, token in zip(output.prompt_logprobs or [], output.prompt_token_ids, strict=False)
        if step is not None
    ]
    return Answer(tokens, said, read, output.num_cached_tokens or 0)


def metric(llm: Any, name: str) -> float:
    """The sum of a counter of the engine's."""
    return sum(entry.value for entry in llm.get_metrics() if entry.name == name)


def started(model: Path, flags: Sequence[str]) -> AbstractContextManager[Server]:
    """``vllm serve``."""
    command = [Path(sys.executable).parent / "vllm", "serve", model]
    return running(command, flags, {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_SERVER_DEV_MODE": "1"})
