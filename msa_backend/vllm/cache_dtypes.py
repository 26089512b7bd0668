"""In which dtypes vLLM's options say that K and V, and index keys, are kept, and which of them are served where.

The two are chosen apart: ``--kv-cache-dtype`` and ``indexer_kv_dtype`` of ``--attention-config``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from msa_backend.config import MSAError
from msa_backend.kernels.caches import FP8_DTYPES
from msa_backend.model.quantization import section_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FP8_KV = {"fp8": E4M3, "fp8_e4m3": E4M3, "fp8_e5m2": E5M2}
FP8_INDEX = {"fp8": E4M3, "fp8_e4m3": E4M3}
LEAST_CAPABILITY = 89
"""Of vLLM's dense attention on pages of 128 tokens in e4m3: FlashAttention 3 on SM90, Triton's elsewhere."""


def kv_dtype(vllm_config: VllmConfig) -> torch.dtype:
    """Of the numbers that all layers keep of keys and values."""
    return _kv_dtypes(vllm_config)[vllm_config.cache_config.cache_dtype]


def index_dtype(vllm_config: VllmConfig) -> torch.dtype:
    """Of the numbers that sparse layers keep of index keys."""
    return _index_dtypes(vllm_config)[vllm_config.attention_config.indexer_kv_dtype]


def check_cache_dtypes(vllm_config: VllmConfig) -> None:
    """Settle an fp8 cache that only the checkpoint asks for, and refuse what is not served.

    Raises:
        MSAError: with the one sentence for the user.
    """
    cache, attention = vllm_config.cache_config, vllm_config.attention_config
    _take_from_checkpoint(vllm_config)
    if cache.cache_dtype not in (allowed := _kv_dtypes(vllm_config)):
        raise MSAError(
            f"--kv-cache-dtype is {cache.cache_dtype}, but MSA keeps K and V in the model's dtype or in fp8 "
            f"({', '.join(allowed)}); leave it out, or pass {list(allowed)[1]} if it is the checkpoint that asks for it"
        )
    if attention.indexer_kv_dtype not in (allowed := _index_dtypes(vllm_config)):
        raise MSAError(
            f"indexer_kv_dtype is {attention.indexer_kv_dtype}, but MSA keeps index keys as {', '.join(allowed)}, "
            "where auto is the model's dtype; leave it out"
        )
    if kv_dtype(vllm_config) in FP8_DTYPES:
        _check_dense_layers(vllm_config)


def _kv_dtypes(vllm_config: VllmConfig) -> dict[str, torch.dtype]:
    own = vllm_config.model_config.dtype
    return {"auto": own, str(own).removeprefix("torch."): own} | FP8_KV


def _index_dtypes(vllm_config: VllmConfig) -> dict[str, torch.dtype]:
    return {"auto": vllm_config.model_config.dtype, "bf16": torch.bfloat16} | FP8_INDEX


def _take_from_checkpoint(vllm_config: VllmConfig) -> None:
    """vLLM makes the cache fp8 while it builds the first dense layer, which may be after the first sparse one."""
    scheme = section_of(vllm_config.model_config.hf_config).get("kv_cache_scheme")
    cache = vllm_config.cache_config
    if not scheme or cache.cache_dtype not in ("auto", *FP8_KV):
        return
    kind = (scheme.get("num_bits"), scheme.get("type"), scheme.get("strategy", "tensor"))
    if kind != (8, "float", "tensor"):
        raise MSAError(
            f"kv_cache_scheme in quantization_config is {' '.join(map(str, kind))}, but MSA serves 8 float tensor, one "
            f"scale a layer; pass --kv-cache-dtype {str(vllm_config.model_config.dtype).removeprefix('torch.')}"
        )
    if cache.cache_dtype == "auto":
        cache.cache_dtype = "fp8"


def _check_dense_layers(vllm_config: VllmConfig) -> None:
    """Refuse what the attention that vLLM brings for dense layers does not take, before it says so by a stack trace."""
    from vllm.platforms import current_platform

    cache = vllm_config.cache_config
    given = f"--kv-cache-dtype is {cache.cache_dtype}"
    otherwise = "leave it out"
    if layers := [layer for layer in cache.kv_cache_dtype_skip_layers or () if layer != "sliding_window"]:
        raise MSAError(
            f"--kv-cache-dtype-skip-layers is {' '.join(layers)}, but MSA keeps K and V of all layers in one dtype; "
            f"{otherwise}"
        )
    if current_platform.is_cpu():
        if not (torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()):
            raise MSAError(
                f"{given}, but vLLM's dense attention on a CPU takes fp8 with AVX-512 or AMX only, and this CPU has "
                f"neither; {otherwise}"
            )
        return
    if not current_platform.has_device_capability(LEAST_CAPABILITY):
        raise MSAError(
            f"{given}, but vLLM's dense attention takes fp8 in pages of 128 tokens from SM{LEAST_CAPABILITY} up, and "
            f"this is {current_platform.get_device_name()}; {otherwise}"
        )
    if kv_dtype(vllm_config) == E5M2:
        raise MSAError(
            f"{given}, but no dense attention of vLLM takes it on a GPU in pages of 128 tokens; pass fp8_e4m3"
        )
