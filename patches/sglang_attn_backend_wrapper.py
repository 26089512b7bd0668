"""Let the registered backend serve MiniMax-M3's sparse layers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from . import APPLIED, NOT_APPLIED, Patch, PatchError

_MODULE = "sglang.srt.layers.attention.attention_registry"
_FUNCTION = "attn_backend_wrapper"
_PARAMETERS = ["runner", "full_attn_backend"]
_MARK = "_msa_hook"


def _apply(around: Callable[..., Any]) -> None:
    """Have SGLang call ``around(original, runner, full_attn_backend)``, once it applies its hooks."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    original = _target()
    if original is None or list(inspect.signature(original).parameters) != _PARAMETERS:
        raise PatchError(PATCH, f"{_FUNCTION}({', '.join(_PARAMETERS)}) is gone or changed")

    def hook(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    setattr(hook, _MARK, True)
    HookRegistry.register(f"{_MODULE}.{_FUNCTION}", hook, HookType.AROUND)


def _status() -> str:
    from sglang.srt.model_executor.model_runner_components import attention_backend_setup

    # The caller holds the function by name; SGLang's registry must have replaced it there too.
    called = getattr(attention_backend_setup, _FUNCTION, None)
    return APPLIED if called is _target() and _is_hooked(called) else NOT_APPLIED


def _target() -> Any:
    from sglang.srt.layers.attention import attention_registry

    return getattr(attention_registry, _FUNCTION, None)


def _is_hooked(function: Any) -> bool:
    """Whether our hook is among those that SGLang has wrapped around ``function``; others may lie around it."""
    while function is not None:
        cells = getattr(function, "__closure__", None) or ()
        if any(hasattr(cell.cell_contents, _MARK) for cell in cells):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


PATCH = Patch(
    name="sglang_attn_backend_wrapper",
    why=(
        "SGLang wraps whichever backend is selected in its in-tree sparse one when the architecture is MiniMax-M3's, "
        "so a registered backend would be asked for the dense layers alone; hooked around, the wrapping is left out"
    ),
    checked_on=("SGLang 0.5.23",),
    retired_by="attn_backend_wrapper asking the selected backend whether it serves sparse layers itself",
    apply=_apply,
    status=_status,
)
