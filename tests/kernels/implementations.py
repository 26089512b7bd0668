"""The implementations that one set of tests runs against.

The GPU's kernels run on a CUDA device, or without one under Triton's interpreter. The interpreter is chosen when
triton is first imported, for the whole process: ``make test`` runs the tests marked ``gpu`` in a process of their own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from msa_backend.kernels import api, cpu, gpu
from msa_backend.kernels.dispatch import Choice

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_CUDA = torch.cuda.is_available() and not INTERPRETED


@dataclass(frozen=True)
class Implementation:
    """The operations of :mod:`msa_backend.kernels.api`, checks included, run by one module."""

    module: ModuleType
    device: str

    def _call(self, operation: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with mock.patch.object(api, "choose", lambda device: Choice(self.module, "a test's")):
            return operation(*args, **kwargs)

    def write(self, *args: Any, **kwargs: Any) -> None:
        self._call(api.write, *args, **kwargs)

    def norm_rope_write(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self._call(api.norm_rope_write, *args, **kwargs)

    def select_blocks(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._call(api.select_blocks, *args, **kwargs)

    def select_candidates(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._call(api.select_candidates, *args, **kwargs)

    def merge_candidates(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._call(api.merge_candidates, *args, **kwargs)

    def sparse_attention(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._call(api.sparse_attention, *args, **kwargs)

    def attend(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._call(api.attend, *args, **kwargs)


CPU = Implementation(cpu, "cpu")
GPU = Implementation(gpu, "cuda" if ON_CUDA else "cpu")
every_implementation = pytest.mark.parametrize(
    "ops", [pytest.param(CPU, id="cpu"), pytest.param(GPU, id="gpu", marks=pytest.mark.gpu)]
)


def examples(number: int) -> settings:
    """How many examples of a property to try.

    The interpreter takes about a second for one. On a GPU each shape and dtype is compiled first, but examples are
    fresh with every run.
    """
    if INTERPRETED:
        number //= 20
    elif ON_CUDA:
        number //= 5
    return settings(max_examples=number)
