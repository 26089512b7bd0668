"""Look at ``--speculative-config`` for a MiniMax-M3 model before vLLM does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from . import Patch, status_of_method, wrap_method

_METHOD = "create_speculative_config"
_PARAMETERS = ["self", "target_model_config", "target_parallel_config"]
_FLAGS = {"spec_method": "method", "spec_model": "model", "spec_tokens": "num_speculative_tokens"}


def _apply(architectures: frozenset[str], check: Callable[[Mapping[str, Any], Any], None]) -> None:
    """Call ``check`` with what was asked and the target's config, for models of ``architectures``."""
    from vllm.engine.arg_utils import EngineArgs

    def checked(original: Callable[..., Any], self: Any, target_model_config: Any, target_parallel_config: Any) -> Any:
        asked = {key.replace("-", "_"): value for key, value in (self.speculative_config or {}).items()}
        asked |= {key: value for flag, key in _FLAGS.items() if (value := getattr(self, flag, None)) is not None}
        if asked and architectures.intersection(target_model_config.architectures):
            check(asked, target_model_config)
        return original(self, target_model_config, target_parallel_config)

    wrap_method(PATCH, EngineArgs, _METHOD, _PARAMETERS, checked)


def _status() -> str:
    from vllm.engine.arg_utils import EngineArgs

    return status_of_method(EngineArgs, _METHOD)


PATCH = Patch(
    name="vllm_speculative_config",
    why=(
        "vLLM divides by the number of MTP modules, which may be 0, and reports what else is wrong inside a dump of "
        "its config; its per-model start-up hook is asked only after that, so no public call comes first"
    ),
    checked_on=("vLLM 0.32", "vLLM 0.33"),
    retired_by="vLLM refusing a checkpoint without MTP modules, and a missing number of draft tokens, in a sentence",
    apply=_apply,
    status=_status,
)
