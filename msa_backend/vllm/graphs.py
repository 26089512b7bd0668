"""Which CUDA graphs a server captures: full ones, for decode batches and for any mix of requests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.config.compilation import CUDAGraphMode
from vllm.platforms import current_platform

from msa_backend.patches import vllm_graphs_of_both_kinds

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def choose(vllm_config: VllmConfig) -> None:
    """Full graphs for every step that is small enough to have one, unless the user chose a mode.

    vLLM's default runs mixed steps in pieces between which attention is called eagerly: a short suffix after a prefix
    hit is then bound by the host.
    """
    compilation = vllm_config.compilation_config
    if compilation.cudagraph_mode is None and current_platform.is_cuda() and vllm_config.use_v2_model_runner:
        compilation.cudagraph_mode = CUDAGraphMode.FULL


def prepare_worker() -> None:
    """Before a worker that holds the model captures."""
    if current_platform.is_cuda():
        vllm_graphs_of_both_kinds.PATCH.apply()
