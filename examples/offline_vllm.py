"""MiniMax-M3 in a Python program through vLLM, no server.

    python examples/offline_vllm.py [MODEL]

MODEL is the tiny checkpoint that `make serve` writes unless another is named; its weights are random, so it answers
in gibberish.
"""

import sys

from vllm import LLM, SamplingParams


def main(model: str) -> None:
    llm = LLM(
        model,
        attention_backend="msa",
        language_model_only=True,  # no vision tower
        max_model_len=2048,
        kv_cache_memory_bytes=2**30,  # small, for a laptop; leave it out on a GPU
        enforce_eager=True,  # quick to start; leave it out on a GPU
    )
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    (answer,) = llm.chat(messages, SamplingParams(max_tokens=32, temperature=0, ignore_eos=True))
    print(answer.outputs[0].text)


if __name__ == "__main__":  # vLLM starts processes of its own, which import this file
    main(sys.argv[1] if len(sys.argv) > 1 else "tiny-m3")
