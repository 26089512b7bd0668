"""Every patch."""

from __future__ import annotations

from . import (
    Patch,
    sglang_attn_backend_wrapper,
    sglang_model_config,
    vllm_backend_name,
    vllm_cpu_version,
    vllm_graphs_of_both_kinds,
    vllm_refuse_other_models,
    vllm_speculative_config,
    vllm_vision_rope,
)

PATCHES: tuple[Patch[...], ...] = (
    vllm_cpu_version.PATCH,
    vllm_backend_name.PATCH,
    vllm_refuse_other_models.PATCH,
    vllm_graphs_of_both_kinds.PATCH,
    vllm_speculative_config.PATCH,
    vllm_vision_rope.PATCH,
    sglang_attn_backend_wrapper.PATCH,
    sglang_model_config.PATCH,
)
