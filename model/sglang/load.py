"""Put canonical weights into SGLang's fused and sharded parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.model_loader.weight_utils import default_weight_loader
from torch import nn

from ..config import M3Config
from ..fused import EXPERT, fused_part
from ..weights import canonical_weights
from .mlp import M3MoE

_SHARED = re.compile(r"\bshared_experts\.(gate|up|down)_proj\.")
_AS_EXPERT = {"gate": "w1", "down": "w2", "up": "w3"}


def load_weights(
    model: nn.Module, weights: Iterable[tuple[str, torch.Tensor]], config: M3Config, shared: int
) -> set[str]:
    """Load a checkpoint in any of its three forms.

    Args:
        shared: how many shared experts run as routed ones.

    Returns:
        The names of the parameters that were filled.

    Raises:
        CheckpointError: a weight is unknown, missing or there twice.
    """
    parameters = dict(model.named_parameters())
    experts = {
        checkpoint_name: (fused_name, expert, shard)
        for fused_name, checkpoint_name, expert, shard in FusedMoE.make_expert_params_mapping(
            ckpt_gate_proj_name="w1",
            ckpt_down_proj_name="w2",
            ckpt_up_proj_name="w3",
            num_experts=config.num_experts + shared,
        )
    }
    loaded = set()
    for name, tensor in canonical_weights(weights, config):
        arguments: tuple[Any, ...]
        keywords: dict[str, Any] = {}
        if shared:  # behind the routed ones
            name = _SHARED.sub(lambda found: f"experts.{config.num_experts}.{_AS_EXPERT[found[1]]}.", name)
        if match := EXPERT.search(name):
            fused_name, expert, shard = experts[match[0]]
            name = name.replace(match[0], fused_name)
            arguments, keywords = (name,), {"shard_id": shard, "expert_id": expert}
        else:
            name, arguments = fused_part(name)
        parameter = parameters[name]
        getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor, *arguments, **keywords)
        loaded.add(name)
    for module in model.modules():
        if isinstance(module, M3MoE):
            module.finish_loading()
    return loaded
