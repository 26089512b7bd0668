"""Tell SGLang of the backend, the model classes and the start-up check."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import sglang
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS, register_attention_backend
from transformers import AutoConfig, PretrainedConfig

from msa_backend.names import SGLANG_BACKEND_NAME
from msa_backend.patches import sglang_attn_backend_wrapper, sglang_model_config
from msa_backend.versions import is_supported, supported_range

from . import engine
from .in_place import MODEL_PACKAGE, MODEL_PACKAGE_VARIABLE

if TYPE_CHECKING:
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger("sglang.msa_backend")


class M3TextConfig(PretrainedConfig):
    """The text half of an original config, of a model type that neither SGLang nor ``transformers`` knows alone."""

    model_type = "minimax_m3_text"


def register(architectures: Iterable[str]) -> None:
    """Register once per process; later calls change nothing."""
    if SGLANG_BACKEND_NAME in ATTENTION_BACKENDS:
        return
    warn_outside_tested_versions(sglang.__version__)
    sglang_attn_backend_wrapper.PATCH.apply(_wrap)
    sglang_model_config.PATCH.apply()
    # Not among those for deterministic inference: that results do not hang on the batch is nowhere tested.
    engine.add_attention_backend_choices([SGLANG_BACKEND_NAME])
    AutoConfig.register(M3TextConfig.model_type, M3TextConfig, exist_ok=True)
    os.environ.setdefault(MODEL_PACKAGE_VARIABLE, MODEL_PACKAGE)
    served = frozenset(architectures)
    for architecture in served:
        engine.register_model_override(architecture)(_prepare)
    engine.register_model_override_predicate(lambda architecture: architecture not in served)(_refuse)
    register_attention_backend(SGLANG_BACKEND_NAME)(_create)


def warn_outside_tested_versions(version: str) -> bool:
    """Warn, with the range, when ``version`` of SGLang is one MSA was never tested on; say whether it did."""
    if is_supported("sglang", version):
        return False
    logger.warning(
        "SGLang is %s, but msa-backend is tested with %s; install such a version if this one misbehaves.",
        version,
        supported_range("sglang"),
    )
    return True


# Adapter code is imported where it is called: every process of SGLang loads the plugin, whatever it serves.


def _prepare(server_args: Any, hf_config: Any) -> dict[str, Any]:
    from .startup import prepare

    return prepare(server_args, hf_config)


def _refuse(server_args: Any, hf_config: Any) -> dict[str, Any]:
    from .startup import refuse_other_models

    refuse_other_models(server_args, hf_config)
    return {}


def _create(runner: ModelRunner) -> AttentionBackend:
    """What ``--attention-backend msa`` asks SGLang's registry for."""
    from .backend import create

    return create(runner)


def _wrap(
    original: Callable[[ModelRunner, AttentionBackend], AttentionBackend],
    runner: ModelRunner,
    full_attn_backend: AttentionBackend,
) -> AttentionBackend:
    """SGLang's ``attn_backend_wrapper``, except for our model class."""
    from .backend import wrap

    return wrap(original, runner, full_attn_backend)
