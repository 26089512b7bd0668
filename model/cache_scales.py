"""Scales of an fp8 KV cache, as quantized checkpoints carry them: what a layer's queries, keys and values were divided
by when the model was calibrated. Free of every engine.

Every layer has its own, dense or sparse. Index keys have none: their order is the same under any.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from .config import M3Config
from .mtp import canonical_name
from .quantized import PLAIN, Stored
from .weights import CACHE_SCALE, CheckpointError, is_other_part, unknown_weights, without_wrapper

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

Scales = dict[str, float]
"""Of one layer: by ``q``, ``k``, ``v`` and ``prob``, whichever the checkpoint holds."""


def owner(name: str) -> tuple[str, str] | None:
    """Whose scale the checkpoint's tensor ``name`` is: the canonical name of the attention, and ``q``, ``k``, ``v``,
    ``kv`` (one for both) or ``prob``; None for any other tensor."""
    found = CACHE_SCALE.search(name)
    if found is None:
        return None
    attention = found["attention"]
    return canonical_name(attention) or without_wrapper(attention), found["kind"] or found["projection"]


def set_aside(weights: Iterable[tuple[str, Tensor]], found: dict[str, Scales]) -> Iterator[tuple[str, Tensor]]:
    """A stream of checkpoint tensors without scales of caches, which are put in ``found`` by their attention.

    Raises:
        CheckpointError: a scale is no positive number.
    """
    for name, tensor in weights:
        if (whose := owner(name)) is None:
            yield name, tensor
            continue
        attention, kind = whose
        value = float(tensor) if tensor.numel() == 1 else math.nan
        if not 0 < value < math.inf:
            raise CheckpointError(
                f"{name} is {value if tensor.numel() == 1 else list(tensor.shape)}, but a scale of an fp8 KV cache is "
                "one positive number; calibrate the checkpoint again, or serve it without --kv-cache-dtype"
            )
        scales = found.setdefault(attention, {})
        scales.update(dict.fromkeys(("k", "v") if kind == "kv" else (kind,), value))


def check_cache_scales(found: Iterable[Stored], config: M3Config) -> None:
    """Check the scales of a checkpoint that is served with an fp8 cache, and say of which layers there are none.

    Args:
        found: all of them, by the names of the file; those of draft layers are left to the drafts.

    Raises:
        CheckpointError: one is of no layer, comes twice, is no single number, or is of K without V or the other way
            round.
    """
    layers: dict[str, dict[str, str]] = {f"model.layers.{i}.self_attn": {} for i in range(config.num_layers)}
    for stored in found:
        whose = owner(stored.name)
        if whose is None or is_other_part(stored.name):
            continue
        attention, kind = whose
        if attention not in layers:
            raise unknown_weights([stored.name])
        if math.prod(stored.shape) != 1 or stored.dtype not in PLAIN:
            raise CheckpointError(
                f"{stored.name} is {stored.dtype} of the shape {list(stored.shape)}, but scales of an fp8 KV cache are "
                f"served as one number a layer, {', '.join(PLAIN)}; calibrate the checkpoint so, or serve it without "
                "--kv-cache-dtype"
            )
        for one in ("k", "v") if kind == "kv" else (kind,):
            if other := layers[attention].get(one):
                raise CheckpointError(f"{other} and {stored.name} are the same scale; remove one of them")
            layers[attention][one] = stored.name
    _check_pairs(layers)
    unread = [
        scales[kind]
        for scales, is_sparse in zip(layers.values(), config.msa.sparse_layers, strict=True)
        for kind in ("q", "prob")
        if is_sparse and kind in scales
    ]
    if unread:
        logger.info(
            "%s and %d more scales of queries and softmax are ignored: sparse layers keep both in the model's dtype.",
            unread[0],
            len(unread) - 1,
        )


def _check_pairs(layers: Mapping[str, Mapping[str, str]]) -> None:
    for attention, scales in layers.items():
        for one, other in (("k", "v"), ("v", "k")):
            if one in scales and other not in scales:
                raise CheckpointError(
                    f"the checkpoint holds {scales[one]}, but no {attention}.{other}_scale; download it again, or "
                    "serve it without --kv-cache-dtype"
                )
    without = [attention for attention, scales in layers.items() if "k" not in scales]
    if without:
        logger.warning(
            "The checkpoint lacks scales of an fp8 KV cache for %d of %d layers (%s.k_scale is the first): K and V are "
            "kept there as they are, and what is larger than fp8 holds becomes the largest that it does.",
            len(without),
            len(layers),
            without[0],
        )
