"""What a model takes on given GPUs, and how many tokens of cache that leaves."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from msa_backend.config import MSAError
from msa_backend.model import sizing
from msa_backend.model.config import M3Config
from msa_backend.model.quantization import quantization_section

GIB = 2**30
FORMS = {None: "bf16", "mxfp8": "mxfp8", "fp8": "fp8", "compressed-tensors": "fp8"}
"""What the weights are kept in, by ``quant_method`` of ``config.json``."""


class Wish(NamedTuple):
    """How a model is to be served.

    Attributes:
        config: its text half.
        form: what its weights are kept in, one of :data:`msa_backend.model.sizing.BITS`.
        ranks: of tensor parallelism.
        kv_item, index_item: bytes of an element of the two caches.
        max_model_len: tokens of the longest sequence; None for what the config allows.
        memory: bytes of one GPU; None if unknown.
    """

    config: M3Config
    form: str = "bf16"
    ranks: int = 1
    kv_item: int = 2
    index_item: int = 2
    max_model_len: int | None = None
    memory: float | None = None


def examine(wish: Wish) -> tuple[list[str], list[str]]:
    """Findings and warnings, a line each."""
    config = wish.config
    weights = sizing.weight_bytes(config, wish.ranks, wish.form)
    cache = sizing.cache_bytes(config, wish.ranks, wish.kv_item, wish.index_item)
    length = wish.max_model_len or config.max_position_embeddings
    found = [
        f"{config.num_layers} layers, {sum(config.msa.sparse_layers)} of them sparse",
        f"weights: {weights / 1e9:.1f} GB on each of {wish.ranks} ranks, {wish.form}, without vision",
        f"cache: {sum(cache):,} bytes a token on each rank, {cache.kv:,} of K/V and {cache.index_keys:,} of index "
        f"keys; {sum(cache) * length / 1e9:.1f} GB for {length:,} tokens",
    ]
    warnings = list(_warnings(config, length))
    if wish.memory is not None:
        tokens = sizing.tokens_that_fit(wish.memory, weights, cache)
        found.append(
            f"of {wish.memory / GIB:.0f} GiB that leaves room for about {tokens:,} tokens of cache, "
            f"{tokens // length:,} sequences of {length:,}"
        )
        if tokens < length:
            warnings.append(
                f"{length:,} tokens do not fit beside the weights, about {tokens:,} do: use more ranks, quantized "
                "weights, an fp8 cache or a smaller --max-model-len."
            )
    return found, warnings


def _warnings(config: M3Config, length: int) -> Iterator[str]:
    if length > config.max_position_embeddings:
        override = json.dumps({"text_config": {"max_position_embeddings": length}})
        yield (
            f"The config allows {config.max_position_embeddings:,} positions, fewer than {length:,}: pass "
            f"--hf-overrides '{override}' to vLLM."
        )


def read_config(model: Path) -> Mapping[str, Any]:
    """The ``config.json`` of a checkpoint's folder.

    Raises:
        MSAError: there is none, or it is not JSON.
    """
    path = model / "config.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise MSAError(f"{path} does not exist; pass the folder of a MiniMax-M3 checkpoint") from None
    except ValueError as error:
        raise MSAError(f"{path} is not JSON ({error}); download it again") from None


def form_of(raw: Mapping[str, Any]) -> str:
    """What the weights of a checkpoint with this ``config.json`` are kept in.

    Raises:
        MSAError: something whose size is not known.
    """
    quantization = quantization_section(raw)
    method = quantization.get("quant_method")
    if method == "modelopt" and quantization.get("quant_algo") == "MXFP8":
        method = "mxfp8"
    if method not in FORMS:
        known = ", ".join(str(name) for name in FORMS if name)
        raise MSAError(f"quant_method is {method}, whose size is not known here; known are {known}")
    return FORMS[method]
