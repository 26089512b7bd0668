"""The MTP modules of a checkpoint: the names and shapes of their weights, which draft tokens. Free of every engine.

Canonical is the original MiniMax form without its ``language_model.`` prefix, and there is no other: ``transformers``
passes over these weights when it loads, and saves none. It keeps ``num_mtp_modules`` in the config all the same, so a
checkpoint may promise modules that it does not hold.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .config import M3Config
from .weights import (
    CheckpointError,
    is_cache_scale,
    is_quantization_scale,
    layer_shapes,
    missing_weights,
    other_shape,
    unknown_weights,
)

if TYPE_CHECKING:
    from torch import Tensor

MODULES_KEY = "num_mtp_modules"
ROOT = "model.mtp.layers"
_NAME = re.compile(r"^(language_model\.)?(model\.)?mtp\.")


def num_modules(text_config: Mapping[str, Any]) -> int:
    """How many MTP modules a text config promises; 1 where it does not say, as engines take it."""
    return text_config.get(MODULES_KEY, 1) or 0


def module_config(config: M3Config) -> M3Config:
    """``config`` for the decoder layer inside an MTP module: every layer is sparse and a mixture of experts."""
    every = (True,) * config.num_layers
    return replace(config, msa=replace(config.msa, sparse_layers=every), moe_layers=every)


def canonical_name(name: str) -> str | None:
    """The canonical name of a checkpoint's tensor; None for what is of no MTP module."""
    return f"model.mtp.{name[found.end() :]}" if (found := _NAME.match(name)) else None


def expected_mtp_shapes(config: M3Config, modules: int) -> dict[str, tuple[int, ...]]:
    """Canonical name and shape of every weight of ``modules`` MTP modules."""
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {}
    for index in range(modules):
        module = f"{ROOT}.{index}"
        shapes |= {f"{module}.{norm}.weight": (hidden,) for norm in ("enorm", "hnorm", "final_layernorm")}
        shapes[f"{module}.eh_proj.weight"] = (hidden, 2 * hidden)
        shapes |= layer_shapes(f"{module}.transformer_layer", config, is_sparse=True, is_moe=True)
    return shapes


def check_mtp_shapes(found: Mapping[str, tuple[int, ...]], config: M3Config, modules: int) -> None:
    """Check that ``found``, shapes of a checkpoint by the names of its tensors, holds the MTP modules that it promises.

    Raises:
        CheckpointError: there are none, a weight is missing or unknown, or one has another shape.
    """
    expected = expected_mtp_shapes(config, modules)
    named = {canonical: name for name in found if (canonical := canonical_name(name))}
    if not named:
        raise CheckpointError(
            f"config.json promises {MODULES_KEY}={modules}, but the checkpoint holds no mtp.* weights, which "
            "transformers drops when it saves; take the original checkpoint, or leave speculative method mtp out"
        )
    if unknown := [name for canonical, name in named.items() if not _has_place(canonical, expected)]:
        raise unknown_weights(unknown)
    for canonical, shape in expected.items():
        if canonical in named and (actual := found[named[canonical]]) != shape:
            raise other_shape(named[canonical], actual, shape)
    if missing := expected.keys() - named.keys():
        raise missing_weights(missing)


def mtp_weights(weights: Iterable[tuple[str, Tensor]], config: M3Config, module: int) -> Iterator[tuple[str, Tensor]]:
    """The weights of one MTP module in a stream of checkpoint tensors, under their canonical names.

    Raises:
        CheckpointError: the module lacks a weight (named when the stream ends), or has one without a place in it or of
            another shape (named at once).
    """
    prefix = f"{ROOT}.{module}."
    expected = {
        name: shape for name, shape in expected_mtp_shapes(config, module + 1).items() if name.startswith(prefix)
    }
    missing = set(expected)
    for name, tensor in weights:
        canonical = canonical_name(name)
        if canonical is None or not canonical.startswith(prefix):
            continue
        if not _has_place(canonical, expected):
            raise unknown_weights([name])
        if canonical in expected and tuple(tensor.shape) != expected[canonical]:
            raise other_shape(name, tuple(tensor.shape), expected[canonical])
        missing.discard(canonical)
        yield canonical, tensor
    if missing:
        raise missing_weights(missing)


def _has_place(name: str, expected: Mapping[str, tuple[int, ...]]) -> bool:
    return name in expected or is_quantization_scale(name, expected) or is_cache_scale(name)
