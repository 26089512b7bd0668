"""What an engine may be able to do, by name: what it lacks is skipped with the reason; docs/what-works.md agrees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import pytest


class Can(Enum):
    """A capability; the value is its row in the table of docs/what-works.md, as far as the row's name is fixed."""

    SERVE_TEXT = "text model"
    EQUAL_TRANSFORMERS = "equal to `transformers`"
    PREFIX_CACHING = "prefix (radix) caching"
    PREEMPTION = "preemption (retraction)"
    DRAFTS = "speculative decoding"
    TENSOR_PARALLEL = "tensor parallelism"
    PIPELINE_PARALLEL = "pipeline parallelism"
    WEIGHT_FORMS = "weights"
    CUDA_GRAPHS = "CUDA graphs"
    GPU_KERNELS = "fast GPU kernels"
    FP8_CACHES = "fp8 KV cache"
    QUANTIZATION = "quantized weights"
    IMAGES = "images and video"
    CALLING = "thinking, tools"
    KV_TRANSFER = "KV transfer"
    LORA = "LoRA, context parallelism"

    # These are no rows.
    FP32 = "fp32"
    ANY_CHUNK = "chunks that are not whole pages"


NO_ROW = {Can.FP32, Can.ANY_CHUNK}


@dataclass(frozen=True)
class Lack:
    """Why an engine cannot do something.

    Attributes:
        why: the reason for which its tests are skipped.
        refused: options that ask for it, in the vocabulary of ``drivers/options.py``, and words of the refusal.
    """

    why: str
    refused: tuple[tuple[Mapping[str, Any], str], ...] = ()


def refused(*asked: tuple[Mapping[str, Any], str]) -> Lack:
    """What the plugin refuses at start-up, in one sentence."""
    return Lack("it is refused", asked)


def needs(*capabilities: Can) -> pytest.MarkDecorator:
    """Skip where the engine lacks one of them. Where it has them, the test is what that page's "works" rests on."""
    return pytest.mark.needs(*capabilities)
