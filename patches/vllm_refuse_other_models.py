"""Stop, instead of serving densely, when the backend is asked for on a model without MSA layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msa_backend import refusals
from msa_backend.names import BACKEND_NAME

from . import Patch, status_of_method, wrap_method

_METHOD = "try_verify_and_update_config"


def _apply(architectures: frozenset[str]) -> None:
    """Check every model that starts with our backend against ``architectures``."""
    from vllm.config import VllmConfig

    def checked(original: Callable[..., None], self: Any) -> None:
        selected = self.attention_config.backend
        if selected is not None and selected.name == BACKEND_NAME and self.model_config is not None:
            found = self.model_config.architectures
            if not architectures.intersection(found):
                raise refusals.no_msa_layers(self.model_config.model, found, architectures)
        original(self)

    wrap_method(PATCH, VllmConfig, _METHOD, ["self"], checked)


def _status() -> str:
    from vllm.config import VllmConfig

    return status_of_method(VllmConfig, _METHOD)


PATCH = Patch(
    name="vllm_refuse_other_models",
    why=(
        "vLLM's CPU platform ignores a backend it does not know and serves the model with its own, and its per-model "
        "start-up hook is asked only for architectures that have one, so no public call sees the others"
    ),
    checked_on=("vLLM 0.32", "vLLM 0.33"),
    retired_by="the CPU platform validating the selected backend, as the CUDA platform does",
    apply=_apply,
    status=_status,
)
