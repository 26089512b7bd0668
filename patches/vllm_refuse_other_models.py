"""Stop, instead of serving densely, when the backend is asked for on a model without MSA layers."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from msa_backend import refusals

from . import PatchError

NAME = "vllm_refuse_other_models"
WHY = (
    "vLLM's CPU platform ignores a backend it does not know and serves the model with its own, and its per-model "
    "start-up hook is asked only for architectures that have one, so no public call sees the others"
)
CHECKED_ON = ("vLLM 0.32", "vLLM 0.33")
RETIRED_BY = "the CPU platform validating the selected backend, as the CUDA platform does"


def apply(backend_name: str, architectures: frozenset[str]) -> None:
    """Check every model that starts with ``backend_name`` against ``architectures``.

    Raises:
        PatchError: vLLM's start-up step is not the method it was.
    """
    from vllm.config import VllmConfig

    original = getattr(VllmConfig, "try_verify_and_update_config", None)
    if original is None or list(inspect.signature(original).parameters) != ["self"]:
        raise PatchError(NAME, "VllmConfig.try_verify_and_update_config(self) is gone or changed", CHECKED_ON)
    if hasattr(original, "_msa_original"):
        return

    @functools.wraps(original)
    def checked(self: Any) -> None:
        selected = self.attention_config.backend
        if selected is not None and selected.name == backend_name and self.model_config is not None:
            found = self.model_config.architectures
            if not architectures.intersection(found):
                raise refusals.no_msa_layers(self.model_config.model, found, architectures)
        original(self)

    checked._msa_original = original  # type: ignore[attr-defined]
    VllmConfig.try_verify_and_update_config = checked


def status() -> str:
    """``applied``, or ``not applied``."""
    from vllm.config import VllmConfig

    return "applied" if hasattr(VllmConfig.try_verify_and_update_config, "_msa_original") else "not applied"
