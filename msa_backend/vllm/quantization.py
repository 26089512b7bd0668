"""Where quantized weights are refused in vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msa_backend import refusals
from msa_backend.model.quantization import section_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

TESTED = "unquantized weights, mxfp8 and fp8 by blocks of 128 x 128"


def check_quantization(vllm_config: VllmConfig) -> None:
    """Refuse quantized weights on a CPU, and untested ones elsewhere.

    Raises:
        MSAError: with the one sentence for the user.
    """
    from vllm.platforms import current_platform

    quantization = vllm_config.model_config.quantization
    if quantization is None:
        return
    # One scale a tensor, and what vLLM quantizes while it loads, go by the name fp8, too.
    section = section_of(vllm_config.model_config.hf_config)
    given = {"mxfp8": section.get("quant_method") == "mxfp8", "fp8": bool(section.get("weight_block_size"))}
    # vLLM's quantized CPU experts disagree on how gate and up lie, and none says so.
    refusals.check_quantization(quantization, current_platform.is_cpu(), TESTED, given.get(quantization, False))
