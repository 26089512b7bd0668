"""Carry the checked M3 config from vLLM's start-up, where ``config.json`` is read, to the model in its worker.

vLLM's own config class fills in the released model's values for whatever a config leaves out, and does not
know the form that ``transformers`` saves. So the file itself is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msa_backend.config import MSAConfigError
from msa_backend.model.config import M3Config, overlay, text_section
from msa_backend.model.vision import VisionConfig

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

_KEY = "msa_config"


def read_config(model_config: ModelConfig) -> dict[str, Any]:
    """The model's ``config.json``, with ``--hf-overrides`` laid over it."""
    overrides = model_config.hf_overrides
    if callable(overrides):
        raise MSAConfigError("hf_overrides is a function, but MSA reads config.json itself; pass a dict instead")
    raw = read_config_file(model_config.hf_config_path or model_config.model, model_config.revision)
    return overlay(raw, overrides or {})


def read_config_file(model: str, revision: str | None) -> dict[str, Any]:
    """The ``config.json`` of a folder or a repository, as it is."""
    from transformers import PreTrainedConfig

    raw, _ = PreTrainedConfig.get_config_dict(model, revision=revision)
    return raw


def record(vllm_config: VllmConfig, config: dict[str, Any]) -> None:
    """Put the config where every worker finds it."""
    if not isinstance(vllm_config.additional_config, dict):
        raise MSAConfigError("additional_config is no dict, but MSA keeps the model's config there; pass a dict")
    vllm_config.additional_config[_KEY] = config


def recorded(vllm_config: VllmConfig) -> M3Config:
    """The text half of the config that ``record`` left."""
    return M3Config.from_text_config(text_section(vllm_config.additional_config[_KEY]))


def recorded_vision(vllm_config: VllmConfig) -> VisionConfig:
    """The vision half of the config that ``record`` left."""
    return VisionConfig.from_config(vllm_config.additional_config[_KEY])
