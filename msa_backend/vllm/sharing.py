"""Which of vLLM's ranks share the scoring of blocks, and by which exchange."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.distributed import get_tp_group
from vllm.logger import init_logger

from msa_backend import refusals
from msa_backend.sharing import SWITCH, SharedScoring, least_tokens

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.msa_backend")


def check_sharing(vllm_config: VllmConfig) -> None:
    """Refuse a switch that is no number, and on a GPU one that is set at all, until a test has run it there."""
    from vllm.platforms import current_platform

    if least_tokens() and vllm_config.parallel_config.tensor_parallel_size > 1 and not current_platform.is_cpu():
        refusals.check_tested(f"{SWITCH} is set", "GPUs that score each for itself")


def shared_scoring(num_index_heads: int) -> SharedScoring | None:
    """How the tensor-parallel ranks share the scoring of all ``num_index_heads``; None if they do not."""
    least = least_tokens()
    if least is None or (group := get_tp_group()).world_size == 1:
        return None
    return _among(group, num_index_heads, least)


@cache
def _among(group: Any, num_index_heads: int, least: int) -> SharedScoring:
    ranks = group.world_size
    logger.info("Steps with contexts of %d tokens or more share the scoring of blocks among %d ranks.", least, ranks)

    def gather(x: Tensor) -> Tensor:
        # Bits are moved, and every exchange knows fp32, but not every one fp8 or whole numbers.
        return group.all_gather(x.view(torch.float32), dim=0).view(x.dtype).view(ranks, *x.shape)

    return SharedScoring(group.rank_in_group, ranks, max(1, ranks // num_index_heads), least, gather)
