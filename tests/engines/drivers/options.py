"""How an engine is started, in words that belong to none, and what it made of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...device import DTYPE

PAGE = 128


@dataclass(frozen=True)
class Options:
    """How an engine is started. None leaves an option to the engine.

    Attributes:
        backend: the attention backend by name.
        dtype: of weights, activations and caches.
        context: tokens of the longest sequence.
        chunk: tokens computed in a step.
        mixed: a step takes running requests beside chunks of prompts.
        pages: size of the KV cache, in pages of 128 tokens.
        page_size: tokens of a page.
        prefix_caching: prompts take the pages of a shared prefix from earlier ones.
        preempting: running requests are thrown out and resumed, given a cache too small for the load.
        drafts: n-gram draft tokens to verify in a step.
        ranks: tensor-parallel ranks.
        apart: nothing of the engine runs in the test's process, as in a server, where the engine leaves the choice.
        overrides: changes of the model's text config; sections are merged.
        tokenizer: whether there is one.
        dummy_weights: invent the weights.
        own: options that other engines do not have, by their own names.
    """

    backend: str | None = "msa"
    dtype: str = DTYPE
    context: int = 8192
    chunk: int = 8192
    mixed: bool = False
    pages: int = 256
    page_size: int | None = None
    prefix_caching: bool = False
    preempting: bool = False
    drafts: int = 0
    ranks: int = 1
    apart: bool = False
    overrides: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: bool = True
    dummy_weights: bool = False
    own: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Parsed:
    """What an engine made of its options before it started a process.

    Attributes:
        backend: the attention backend that layers other than the sparse ones will ask for; None is the platform's best.
        page_size: tokens of a page.
        topk: blocks that a query chooses; None for a model without MSA layers.
    """

    backend: str | None
    page_size: int
    topk: int | None


def as_flags(arguments: Mapping[str, Any]) -> list[str]:
    """Options of an engine's Python interface as those of its command line."""
    flags = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):  # of a flag that may be given several times
            flags += [word for each in value for word in (f"--{flag}", each)]
        else:
            flags += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags
