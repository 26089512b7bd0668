"""Put canonical weights into vLLM's fused and sharded parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import fused_moe_make_expert_params_mapping
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.utils import is_pp_missing_parameter

from msa_backend.vllm.layer import MSAAttention

from ..cache_scales import Scales, set_aside
from ..config import M3Config
from ..fused import EXPERT, fused_part
from ..mtp import mtp_weights
from ..weights import CheckpointError, canonical_weights
from .attention import M3FullAttention
from .mlp import M3MoE

_SCALE = re.compile(r"\.weight_scale(_inv)?$")
_CODES = (torch.float8_e4m3fn, torch.uint8)


def load_weights(model: nn.Module, weights: Iterable[tuple[str, torch.Tensor]], config: M3Config) -> set[str]:
    """Load the text model from a checkpoint in any of its three forms.

    Returns:
        The names of the parameters that were filled; vLLM checks that none was left out.

    Raises:
        CheckpointError: a weight is unknown, missing or there twice, or is quantized where vLLM's layer is not, or
            the other way round.
    """
    scales: dict[str, Scales] = {}
    loaded = fill(model, canonical_weights(set_aside(weights, scales), config), config)
    hand_out(scales, model)
    return loaded


def load_mtp_module(model: nn.Module, weights: Iterable[tuple[str, torch.Tensor]], config: M3Config) -> set[str]:
    """Load the first MTP module of a checkpoint, as ``model.layers.0``.

    Returns:
        As :func:`load_weights`.

    Raises:
        CheckpointError: a weight of the module is unknown or missing.
    """
    scales: dict[str, Scales] = {}
    module = mtp_weights(set_aside(weights, scales), config, 0)
    loaded = fill(model, ((name.replace(".mtp.", "."), tensor) for name, tensor in module), config)
    hand_out({name.replace(".mtp.", "."): found for name, found in scales.items()}, model)
    return loaded


def hand_out(scales: Mapping[str, Scales], model: nn.Module) -> None:
    """Give each attention layer of this rank its scales of an fp8 cache."""
    for name, module in model.named_modules():
        if isinstance(module, M3FullAttention | MSAAttention) and (of_layer := scales.get(name.removesuffix(".attn"))):
            module.take_scales(of_layer)


def fill(model: nn.Module, canonical: Iterable[tuple[str, torch.Tensor]], config: M3Config) -> set[str]:
    """Put whole weights, by the names of ``model``'s parameters before vLLM fused them, where they belong.

    Raises:
        CheckpointError: a weight is quantized where vLLM's layer is not, or the other way round.
    """
    parameters = dict(model.named_parameters())
    experts = {
        checkpoint_name: (fused_name, expert, shard)
        for fused_name, checkpoint_name, expert, shard in fused_moe_make_expert_params_mapping(
            model,
            ckpt_gate_proj_name="w1",
            ckpt_down_proj_name="w2",
            ckpt_up_proj_name="w3",
            num_experts=config.num_experts,
        )
    }
    # The format decides which of its two names a scale has in vLLM's layers, whatever the checkpoint calls it.
    scale = ".weight_scale_inv" if any(name.endswith("_scale_inv") for name in parameters) else ".weight_scale"
    loaded = set()
    for canonical_name, tensor in canonical:
        name = _SCALE.sub(scale, canonical_name)
        arguments: tuple[Any, ...]
        keywords: dict[str, Any] = {}
        if match := EXPERT.search(name):
            fused_name, expert, shard = experts[match[0]]
            name = name.replace(match[0], fused_name)
            arguments, keywords = (name,), {"shard_id": shard, "expert_id": expert}
        else:
            name, arguments = fused_part(name)
        if is_pp_missing_parameter(name, model):
            continue
        if name not in parameters:
            raise CheckpointError(
                f"{canonical_name} has no place in the layer that vLLM makes of quantization_config; correct its "
                "ignore list, or download the checkpoint again"
            )
        parameter = parameters[name]
        _check_dtype(canonical_name, tensor, parameter)
        getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor, *arguments, **keywords)
        loaded.add(name)
    for module in model.modules():
        if isinstance(module, M3MoE):
            module.finish_loading()
    return loaded


def _check_dtype(name: str, tensor: torch.Tensor, parameter: torch.Tensor) -> None:
    """Refuse what torch would cast: codes without their scales, or plain weights as if they were codes."""
    if (tensor.dtype in _CODES) != (parameter.dtype in _CODES):
        raise CheckpointError(
            f"{name} is {tensor.dtype}, but quantization_config makes it {parameter.dtype} in vLLM; correct its ignore "
            "list, or download the checkpoint again"
        )
