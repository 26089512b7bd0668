"""Triton's interpreter without half of its work, which no result comes from.

It wraps the functions of ``triton.language`` anew at every call of a device function, though they stay wrapped until
the kernel has ended; and for each sum and product of integers it computes whether they overflow, then drops the answer
unless it is told to debug. It also makes its table of dtypes anew for each look into it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


class _Scope:
    """What a launch has wrapped.

    Args:
        undo: of the interpreter's own scope; None if it wrapped nothing.
        wrapped: emptied when the launch ends.
    """

    def __init__(self, undo: Callable[[], None] | None, wrapped: set[Any]) -> None:
        self._undo, self._wrapped = undo, wrapped

    def restore(self) -> None:
        self._wrapped.clear()
        if self._undo:
            self._undo()


def hasten() -> None:
    """For all kernels of this process that follow; where another Triton has none of these functions, it stays slow."""
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)
    if look_up := getattr(interpreter, "_get_np_dtype", None):
        known: dict[str, Any] = {}

        def dtype(kind: Any) -> Any:
            if kind.name not in known:
                known[kind.name] = look_up(kind)
            return known[kind.name]

        interpreter._get_np_dtype = dtype
    wrap = getattr(interpreter, "_patch_lang", None)
    if wrap is None:
        return
    wrapped: set[Any] = set()

    def wrap_once(function: Any) -> _Scope:
        languages = {value for value in function.__globals__.values() if value is tl or value is tl.core}
        if languages <= wrapped:
            return _Scope(None, wrapped)
        wrapped.update(languages)
        return _Scope(wrap(function).restore, wrapped)

    interpreter._patch_lang = wrap_once
