"""The entry points through which engines find MSA. Safe to call twice, and in every process of an engine."""

from __future__ import annotations

import os

BACKEND_NAME = "MSA"
"""What ``--attention-backend`` is given, in the case vLLM registers names in; users may write either."""

M3_ARCHITECTURES = {
    "MiniMaxM3SparseForCausalLM": "text only, original form",
    "MiniMaxM3VLForCausalLM": "text only, transformers form",
    "MiniMaxM3SparseForConditionalGeneration": "with a vision tower, both forms",
}


def is_disabled() -> bool:
    """Whether the user took the plugin out, with ``MSA_DISABLE=1``."""
    return os.environ.get("MSA_DISABLE", "0") not in ("", "0")


def register_vllm() -> None:
    """Entry point ``vllm.general_plugins: msa``."""
    if is_disabled():
        return
    from msa_backend.vllm.registration import register

    register(M3_ARCHITECTURES)
