"""Carry the checked M3 config from SGLang's start-up, where ``config.json`` is read, to the model in its scheduler.

SGLang's own config classes fill in the released model's values for whatever a config leaves out, and its cache
reads the original form alone. So the file itself is read, and what it says is recorded in the one public place that
every process of SGLang lays over the config: the value of ``--json-model-override-args``.
"""

from __future__ import annotations

import json
from typing import Any

from msa_backend.config import MSAConfigError
from msa_backend.model.config import M3Config, overlay, text_section
from msa_backend.names import TEXT_ARCHITECTURE

_KEY = "msa_text_config"


def read_text_config(model_path: str, revision: str | None, overrides: str) -> dict[str, Any]:
    """The text section of the model's ``config.json``, with ``--json-model-override-args`` laid over it."""
    from transformers import PretrainedConfig

    raw, _ = PretrainedConfig.get_config_dict(model_path, revision=revision)
    return dict(text_section(overlay(raw, json.loads(overrides))))


def record(overrides: str, text_config: dict[str, Any], architecture: str, is_whole: bool) -> str:
    """The user's ``--json-model-override-args`` with the text config added, in the forms that are read later.

    Args:
        architecture: of the checkpoint.
        is_whole: whether the config has a text section; a text-only one is that section.
    """
    # Whole, not just what changed: SGLang replaces a section as often as it updates one.
    section = text_config | {"sparse_attention_config": M3Config.from_text_config(text_config).msa.to_original_form()}
    added: dict[str, Any] = {_KEY: text_config} | ({"text_config": section} if is_whole else section)
    if "Sparse" not in architecture:
        # SGLang knows MiniMax-M3's caches by this name only; the class we give it serves every form.
        added["architectures"] = [TEXT_ARCHITECTURE]
    return json.dumps(overlay(json.loads(overrides), added))


def recorded(hf_config: Any) -> M3Config:
    """The config that ``record`` left."""
    text_config = getattr(hf_config, _KEY, None)
    if text_config is None:
        raise MSAConfigError(
            "SGLang's start-up did not load msa-backend's plugin, but its model class was asked for; look for msa in "
            "SGLANG_PLUGINS, or unset SGLANG_EXTERNAL_MODEL_PACKAGE"
        )
    return M3Config.from_text_config(text_config)
