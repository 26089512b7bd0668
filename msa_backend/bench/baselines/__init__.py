"""The implementations that are timed, one module each.

A module has ``unavailable(device)``, which says in one line why it cannot run here, or None; and
``bind(inputs, block_ids)``, which returns a :class:`Bound`; those of :data:`WITH_LAYER` also
``layer(inputs, projection)``, which returns a :class:`Layer`. Engines are imported inside these functions only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from msa_backend.bench.timing import Call

NAMES = ("ours", "reference", "vllm", "sglang", "fa3", "flashinfer")
# FlashInfer compiles for minutes before its first call, so it is there when asked for.
DEFAULT = NAMES[:-1]
WITH_LAYER = ("ours", "vllm")


class UnsupportedCaseError(Exception):
    """An implementation does not take such a case; the message says what it lacks."""


@dataclass(frozen=True)
class Bound:
    """An implementation on one set of inputs. Calls write to the same places each time, fit for a CUDA graph.

    Attributes:
        attend: returns ``[num_tokens, num_heads, dim]``; of the block ids it was bound with, or of all tokens if dense.
        select: returns ``[num_kv_heads, num_tokens, topk]`` block ids; None if dense.
        parts: stages that can be called by themselves.
        whole: select and attend in one, where that is more than the two after each other.
        poisoned: what to fill with NaN before the output is checked.
    """

    attend: Call
    select: Call | None = None
    parts: dict[str, Call] = field(default_factory=dict)
    whole: Call | None = None
    poisoned: Tensor | None = None


@dataclass(frozen=True)
class Layer:
    """All operations of a sparse layer between its projections, as an engine calls them, on one set of inputs.

    Attributes:
        write: norms and rotates what the fused projection made, and writes keys and values of the new tokens.
        attend: selects and attends, with the queries of the inputs.
    """

    write: Call
    attend: Call


def load(name: str) -> ModuleType:
    return import_module(f"{__name__}.{name}")
