"""Tell vLLM of the backend, the model classes, the parsers of answers and the start-up check."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import vllm
from transformers import AutoConfig
from vllm.logger import init_logger
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.transformers_utils.configs.minimax_m3 import MiniMaxM3TextConfig
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from msa_backend.names import BACKEND_NAME, IMAGE_ARCHITECTURE, PARSER_NAME
from msa_backend.patches import vllm_backend_name, vllm_refuse_other_models, vllm_speculative_config
from msa_backend.versions import is_supported, supported_range

from .images import no_images

logger = init_logger("vllm.msa_backend")

BACKEND_CLASS = "msa_backend.vllm.backend.MSABackend"
MODEL_CLASS = "msa_backend.model.vllm.causal_lm:MiniMaxM3ForCausalLM"
IMAGE_MODEL_CLASS = "msa_backend.model.vllm.multimodal:MiniMaxM3ForConditionalGeneration"
DRAFT_ARCHITECTURE = "MiniMaxM3MTP"
DRAFT_CLASS = "msa_backend.model.vllm.mtp:MiniMaxM3MTP"
REASONING_PARSER = ("msa_backend.vllm.reasoning_parser", "MSAReasoningParser")
TOOL_PARSER = ("msa_backend.vllm.tool_parser", "MSAToolParser")


def register(architectures: Iterable[str], entry_point: Callable[[], None]) -> None:
    """Register once per process; later calls change nothing.

    Args:
        architectures: those that our model classes serve.
        entry_point: what calls this in every process of vLLM; a function of a module, so that it pickles.

    Raises:
        PatchError: this vLLM is not what a patch was made for.
    """
    if BACKEND_NAME in AttentionBackendEnum.__members__:
        return
    warn_outside_tested_versions(vllm.__version__)
    register_backend(BACKEND_NAME, BACKEND_CLASS)
    vllm_backend_name.PATCH.apply(entry_point)
    # vLLM has a class for the text half's config, but looks only for the whole model's type.
    AutoConfig.register(MiniMaxM3TextConfig.model_type, MiniMaxM3TextConfig, exist_ok=True)
    for architecture in architectures:
        takes_images = architecture == IMAGE_ARCHITECTURE and no_images() is None
        ModelRegistry.register_model(architecture, IMAGE_MODEL_CLASS if takes_images else MODEL_CLASS)
        MODELS_CONFIG_MAP[architecture] = _checked_at_startup(
            MODELS_CONFIG_MAP.get(architecture, VerifyAndUpdateConfig)
        )
    ModelRegistry.register_model(DRAFT_ARCHITECTURE, DRAFT_CLASS)
    ReasoningParserManager.register_lazy_module(PARSER_NAME, *REASONING_PARSER)
    ToolParserManager.register_lazy_module(PARSER_NAME, *TOOL_PARSER)
    vllm_refuse_other_models.PATCH.apply(frozenset(architectures))
    vllm_speculative_config.PATCH.apply(frozenset(architectures), _check_drafts)


def warn_outside_tested_versions(version: str) -> bool:
    """Warn, with the range, when ``version`` of vLLM is one MSA was never tested on; say whether it did."""
    if is_supported("vllm", version):
        return False
    logger.warning(
        "vLLM is %s, but msa-backend is tested with %s; install such a version if this one misbehaves.",
        version,
        supported_range("vllm"),
    )
    return True


def _check_drafts(asked: Mapping[str, Any], model_config: vllm.config.ModelConfig) -> None:
    from .drafts import check_request

    check_request(asked, model_config)


def _checked_at_startup(existing: type[VerifyAndUpdateConfig]) -> type[VerifyAndUpdateConfig]:
    """vLLM's own start-up step for an architecture, followed by ours."""

    class CheckMSA(existing):
        @classmethod
        def verify_and_update_config(cls, vllm_config: vllm.config.VllmConfig) -> None:
            from .startup import prepare

            super().verify_and_update_config(vllm_config)
            prepare(vllm_config)

    return CheckMSA
