"""Let a model's start-up step change what SGLang reads from ``config.json``."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from . import APPLIED, NOT_APPLIED, Patch, PatchError

_KEPT = "_model_config"
_STEP = "handle_model_specific_adjustments"


def _apply() -> None:
    """Have SGLang read the model's config again once its start-up step has changed ``json_model_override_args``."""
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

    if _status() == APPLIED:
        return
    if not _is_kept():
        raise PatchError(PATCH, f"model_config_of(server_args) does not keep what it read in server_args.{_KEPT}")
    try:
        register_resolution_hook(_STEP)(_reread)
    except ValueError as error:
        raise PatchError(PATCH, f"{_STEP} takes no resolution hook") from error


def _reread(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Around the step that runs the model's; it belongs to every model, and nearly none changes its config there."""
    from sglang.srt.arg_groups.model_override_base import resolving_view

    options = resolving_view(server_args)
    before = options.json_model_override_args
    previous(server_args)
    if options.json_model_override_args != before:
        setattr(server_args, _KEPT, None)


def _is_kept() -> bool:
    """Whether SGLang hands out again what lies in the field that ``_reread`` empties."""
    from sglang.srt.arg_groups.model_override_base import model_config_of

    config = object()
    try:
        return model_config_of(SimpleNamespace(**{_KEPT: config})) is config
    except Exception:  # whatever comes of reading a config that is not there
        return False


def _status() -> str:
    from sglang.srt.arg_groups import resolution_hooks

    return APPLIED if _reread in resolution_hooks._HOOKS.get(_STEP, ()) else NOT_APPLIED


PATCH = Patch(
    name="sglang_model_config",
    why=(
        "SGLang reads the model's config before it runs the model's start-up step, and keeps it under the model's path "
        "alone, so what that step puts into --json-model-override-args is never read; no public call drops what is "
        "kept, and a step before the first reading would have to read every model's config itself"
    ),
    checked_on=("SGLang 0.5.23",),
    retired_by="model_config_of keeping the config under json_model_override_args too, not under model_path alone",
    apply=_apply,
    status=_status,
)
