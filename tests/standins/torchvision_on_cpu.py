"""Lets the torchvision of PyPI be imported beside a CPU build of torch. Imported by a .pth file at every start.

SGLang imports torchvision whatever it serves, and vLLM's image processors for MiniMax-M3 need it. The compiled half of
PyPI's build wants CUDA and does not load, which torchvision tolerates, except that it then describes two operators that
nobody has defined. They are defined here, without a kernel, right before that; nothing is imported in a process that
does not ask for it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

OPERATORS = ("nms", "qnms")
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class _BeforeItsOperators:
    """A finder that finds nothing; it is asked before those that do."""

    def __init__(self) -> None:
        self.library: Any = None  # torch forgets the operators when this is gone

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # The module that describes the operators; the compiled half has been tried before it.
        if fullname == "torchvision._meta_registrations" and self.library is None:
            import torch

            if not hasattr(torch.ops.torchvision, OPERATORS[0]):
                self.library = torch.library.Library("torchvision", "FRAGMENT")
                for name in OPERATORS:
                    self.library.define(name + SCHEMA)
        return None


sys.meta_path.insert(0, _BeforeItsOperators())
