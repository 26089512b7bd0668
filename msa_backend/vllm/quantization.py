"""Quantized weights in vLLM: where they are refused, and the fp8 cache that their config may ask for unasked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msa_backend import refusals
from msa_backend.config import MSAError

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def check_quantization(vllm_config: VllmConfig) -> None:
    """Refuse quantized weights on a CPU, untested ones elsewhere, and fp8 caches that only the checkpoint asks for.

    Raises:
        MSAError: with the one sentence for the user.
    """
    from vllm.platforms import current_platform

    model = vllm_config.model_config
    if model.quantization is None:
        return
    on_cpu = current_platform.is_cpu()
    section = getattr(model.hf_config, "quantization_config", None) or {}
    # vLLM makes the cache fp8 while it builds the first dense layer, after this check and with nobody asking.
    if not on_cpu and section.get("kv_cache_scheme") and vllm_config.cache_config.cache_dtype == "auto":
        raise MSAError(
            "kv_cache_scheme in quantization_config asks for a quantized cache, which is not served yet; "
            f"pass --kv-cache-dtype {str(model.dtype).removeprefix('torch.')}"
        )
    # vLLM's quantized CPU experts disagree on how gate and up lie, and none says so.
    refusals.check_quantization(model.quantization, on_cpu)
