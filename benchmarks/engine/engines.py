"""The engines that can be measured, and what is said to each in words of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from engine.session import Session


@dataclass(frozen=True)
class Engine:
    """One of them.

    Attributes:
        title: its name in sentences.
        model: its option for the model.
        longest: its option for the longest sequence.
        eager: the options that turn its graphs off.
        options: that every run gives it.
        environment: variables of every process of it.
        lacks: parts of a run that it has no means for, and why.
    """

    title: str
    model: str
    longest: str
    eager: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    lacks: dict[str, str] = field(default_factory=dict)


ENGINES = {
    "vllm": Engine(
        "vLLM",
        "model",
        "max_model_len",
        {"enforce_eager": True},
        {"language_model_only": True},
        # The second lets `Session` ask the worker for the settings that vLLM resolved.
        {"VLLM_NO_USAGE_STATS": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"},
    ),
    "sglang": Engine(
        "SGLang",
        "model_path",
        "context_length",
        {"disable_cuda_graph": True},
        lacks={"serve": "`vllm bench serve` replays conversations against vLLM's server alone"},
    ),
}


def start(engine: str, options: dict[str, Any]) -> Session:
    """A running engine by its name in ENGINES."""
    if engine == "sglang":
        from engine.on_sglang import SGLangSession

        return SGLangSession(options)
    from engine.on_vllm import VLLMSession

    return VLLMSession(options)
