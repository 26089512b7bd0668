"""Where quantized weights are refused in vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msa_backend import refusals

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def check_quantization(vllm_config: VllmConfig) -> None:
    """Refuse quantized weights on a CPU, and untested ones elsewhere.

    Raises:
        MSAError: with the one sentence for the user.
    """
    from vllm.platforms import current_platform

    quantization = vllm_config.model_config.quantization
    if quantization is None:
        return
    # vLLM's quantized CPU experts disagree on how gate and up lie, and none says so.
    refusals.check_quantization(quantization, current_platform.is_cpu())
