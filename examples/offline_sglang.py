"""MiniMax-M3 in a Python program through SGLang on a CPU, no server.

    SGLANG_USE_CPU_ENGINE=1 python examples/offline_sglang.py [MODEL]

MODEL is the tiny checkpoint that `make serve-sglang` writes unless another is named; its weights are random, so it
answers in gibberish.
"""

import sys

from sglang import Engine


def main(model: str) -> None:
    engine = Engine(
        model_path=model,
        attention_backend="msa",
        device="cpu",
        context_length=2048,
        max_total_tokens=16_384,
        disable_cuda_graph=True,
        log_level="warning",
    )
    answer = engine.generate("The capital of France is", {"max_new_tokens": 32, "temperature": 0, "ignore_eos": True})
    print(answer["text"])
    engine.shutdown()


if __name__ == "__main__":  # SGLang starts processes of its own, which import this file
    main(sys.argv[1] if len(sys.argv) > 1 else "tiny-m3")
