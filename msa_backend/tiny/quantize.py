"""Quantize the text layers' projections and experts, in the forms in which MiniMax-M3 is published.

Codes are E4M3. Scales are powers of two, rounded up so that nothing saturates: an engine that keeps block scales as
powers of two loses nothing, and code times scale is exact in bf16.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from msa_backend.tiny.errors import TinyCheckpointError

if TYPE_CHECKING:
    import torch

BLOCKS = {"mxfp8": (1, 32), "fp8": (128, 128)}
"""Rows and columns that share a scale."""
QUANTIZATIONS = tuple(BLOCKS)
SCALE = "weight_scale_inv"
LARGEST = 448.0
E8M0_BIAS = 127

_TEXT_LAYER = re.compile(r"^language_model\.model\.layers\.\d+\.")
_ROUTER = ".block_sparse_moe.gate.weight"
_NOT_TEXT = ("vision_tower", "multi_modal_projector", "patch_merge_mlp")


def quantize(weights: dict[str, torch.Tensor], method: str) -> dict[str, torch.Tensor]:
    """The weights with each projection and expert ``[N, K]`` as E4M3 codes, and its scales beside it.

    MXFP8 scales are E8M0 exponents, uint8 ``[N, K/32]``; those of fp8 are float32, one for each 128 x 128.

    Raises:
        TinyCheckpointError: a weight does not divide into blocks.
    """
    quantized = {}
    for name, weight in weights.items():
        if not _is_quantized(name, weight):
            quantized[name] = weight
            continue
        codes, exponents = _codes(name, weight.float(), BLOCKS[method])
        quantized[name] = codes
        scales = (exponents + E8M0_BIAS).byte() if method == "mxfp8" else exponents.float().exp2()
        quantized[name.removesuffix("weight") + SCALE] = scales
    return quantized


def quantization_config(weights: dict[str, torch.Tensor], method: str) -> dict[str, Any]:
    """The ``quantization_config`` of ``quantize(weights, method)``; its ignore list has the names of the weights."""
    linears = [name for name, weight in weights.items() if name.startswith("language_model.") and weight.dim() == 2]
    excluded = [name.removesuffix(".weight") for name in linears if not _is_quantized(name, weights[name])]
    scales = {"scale_fmt": "ue8m0"} if method == "mxfp8" else {}
    return {
        "quant_method": method,
        "activation_scheme": "dynamic",
        "weight_block_size": list(BLOCKS[method]),
        **scales,
        "ignored_layers": [*excluded, *_NOT_TEXT],
    }


def _is_quantized(name: str, weight: torch.Tensor) -> bool:
    return bool(_TEXT_LAYER.match(name)) and weight.dim() == 2 and not name.endswith(_ROUTER)


def _codes(name: str, weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 codes, and the exponent of each block's scale, int32."""
    import torch

    if any(size % part for size, part in zip(weight.shape, block, strict=True)):
        raise TinyCheckpointError(
            f"{name} is {list(weight.shape)}, which does not divide into blocks of {block[0]} x {block[1]}; choose "
            "sizes that do, or leave --quantization out"
        )
    blocks = weight.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))
    largest = blocks.abs().amax(dim=(1, 3)).clamp(min=torch.finfo(torch.float32).tiny)
    exponents = (largest / LARGEST).log2().ceil().clamp(min=-E8M0_BIAS).int()
    scaled = torch.ldexp(blocks, -exponents[:, None, :, None])
    return scaled.flatten(0, 1).flatten(1).to(torch.float8_e4m3fn), exponents
