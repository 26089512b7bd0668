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
from ..weights import canonical_weights

_EXPERT = re.compile(r"experts\.\d+\.w[123]\.")
_FUSED = (
    (".q_proj.", ".qkv_proj.", "q"),
    (".k_proj.", ".qkv_proj.", "k"),
    (".v_proj.", ".qkv_proj.", "v"),
    (".index_q_proj.", ".index_qk_proj.", "q"),
    (".index_k_proj.", ".index_qk_proj.", "k"),
    (".gate_proj.", ".gate_up_proj.", 0),
    (".up_proj.", ".gate_up_proj.", 1),
)


def load_weights(model: nn.Module, weights: Iterable[tuple[str, torch.Tensor]], config: M3Config) -> set[str]:
    """Load a checkpoint in any of its three forms.

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
            num_experts=config.num_experts,
        )
    }
    loaded = set()
    for name, tensor in canonical_weights(weights, config):
        arguments: tuple[Any, ...] = ()
        keywords: dict[str, Any] = {}
        if match := _EXPERT.search(name):
            fused_name, expert, shard = experts[match[0]]
            name = name.replace(match[0], fused_name)
            arguments, keywords = (name,), {"shard_id": shard, "expert_id": expert}
        elif part := next((part for part in _FUSED if part[0] in name), None):
            name = name.replace(part[0], part[1])
            arguments = (part[2],)
        parameter = parameters[name]
        getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor, *arguments, **keywords)
        loaded.add(name)
    return loaded
