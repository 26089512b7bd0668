"""What was run on a GPU by itself alone: two of them at once are refused until they were run together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msa_backend import refusals
from msa_backend.kernels.caches import FP8_DTYPES

from .cache_dtypes import index_dtype, kv_dtype

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def check_together(vllm_config: VllmConfig) -> None:
    """Refuse two or more of: quantized weights, fp8 caches, drafts, several ranks; on a GPU.

    Of K, V and index keys either may be in fp8, or both: these were run together.

    Raises:
        MSAError: with the one sentence for the user.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return
    if len(found := _found(vllm_config)) > 1:
        refusals.check_tested(f"{' and '.join(found)} on a GPU", "one of these at a time there")


def _found(vllm_config: VllmConfig) -> list[str]:
    found = []
    if quantization := vllm_config.model_config.quantization:
        found.append(f"quantization is {quantization}")
    if kv_dtype(vllm_config) in FP8_DTYPES:
        found.append(f"--kv-cache-dtype is {vllm_config.cache_config.cache_dtype}")
    elif index_dtype(vllm_config) in FP8_DTYPES:
        found.append(f"indexer_kv_dtype is {vllm_config.attention_config.indexer_kv_dtype}")
    if speculative := vllm_config.speculative_config:
        found.append(f"speculative method is {speculative.method}")
    if (ranks := vllm_config.parallel_config.tensor_parallel_size) > 1:
        found.append(f"--tensor-parallel-size is {ranks}")
    return found
