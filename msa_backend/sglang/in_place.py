"""Whether SGLang took all of the plugin in this process: asked at start-up, by the backend and by the model class.

A leaf: registration names those three, and they import this.
"""

from __future__ import annotations

from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

from msa_backend.config import MSAError
from msa_backend.names import SGLANG_BACKEND_NAME
from msa_backend.patches import APPLIED, sglang_attn_backend_wrapper, sglang_model_config

MODEL_PACKAGE = "msa_backend.model.sglang.entry"
MODEL_PACKAGE_VARIABLE = "SGLANG_EXTERNAL_MODEL_PACKAGE"


def require_in_place() -> None:
    """Refuse to serve from a process in which SGLang dropped part of the plugin, as it does with a line in the log.

    Raises:
        MSAError: the backend is not registered here, or a patch did not take.
    """
    lacking = [] if SGLANG_BACKEND_NAME in ATTENTION_BACKENDS else ["the backend is not registered"]
    for patch in (sglang_attn_backend_wrapper.PATCH, sglang_model_config.PATCH):
        if (status := patch.status()) != APPLIED:
            lacking.append(f"the patch {patch.name} is {status}")
    if lacking:
        raise MSAError(
            f"SGLang did not take msa-backend's plugin in this process ({', '.join(lacking)}) and would serve its "
            "in-tree attention; look for msa in its log and in SGLANG_PLUGINS, or set MSA_DISABLE=1 to serve without "
            "msa-backend"
        )
