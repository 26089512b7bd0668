"""Check that the weights of a checkpoint are quantized as its config says. Free of every engine.

No engine does: where list and weights disagree, vLLM casts one into the other and serves garbage without a word.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from .quantization import Quantization, fused_layer
from .weights import WEIGHT_SCALES, CheckpointError, is_other_part, missing_scale, module_name

QUANTIZED = "F8_E4M3"
PLAIN = ("F32", "BF16", "F16")
_ROUTER = ".block_sparse_moe.gate"
_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"


class Stored(NamedTuple):
    """A canonical weight or scale as the checkpoint holds it.

    Attributes:
        name: of the tensor in the file.
        dtype: as safetensors names it.
        shape: of this weight, which may be a part of the tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


def check_quantized(
    found: Mapping[str, Stored], expected: Mapping[str, tuple[int, ...]], quantization: Quantization | None
) -> None:
    """Check dtypes and scales of a checkpoint that has all its weights, in their shapes.

    Args:
        found: weights and scales by canonical name.
        expected: shapes of the weights alone.

    Raises:
        CheckpointError: the ignore list matches nothing; a fused layer is excluded by half, or has parts of different
            dtypes; a weight is quantized though it should not be, or the other way round; a scale is missing, is one
            too many or has another dtype or shape; a projection fused with an index branch has per-tensor scales.
    """
    weights = {module_name(name): found[name] for name in expected}
    quantized: set[str] = set()
    if quantization is not None:
        linears = {module for module in weights if is_linear(module, weights[module].shape, quantization)}
        _check_ignore_list(quantization, weights)
        _check_fused_layers(linears, weights, quantization)
        quantized = {module for module in linears if quantization.excluding(module) is None}
        for module in sorted(quantized):
            _check_scale(module, weights[module], found, quantization)
    for module in sorted(weights.keys() - quantized):
        if weights[module].dtype not in PLAIN:
            raise CheckpointError(
                f"{weights[module].name} is {weights[module].dtype}, but {_why_plain(module, quantization)}; "
                "take config.json and weights from the same checkpoint"
            )
    for name in sorted(found.keys() - expected.keys()):
        if module_name(name) not in quantized:
            raise CheckpointError(
                f"{found[name].name} is a scale, but {_why_plain(module_name(name), quantization)}; "
                "take config.json and weights from the same checkpoint"
            )


def is_linear(module: str, shape: tuple[int, ...], quantization: Quantization) -> bool:
    """Whether vLLM quantizes ``module``, whose weight is of ``shape``, unless the ignore list says otherwise."""
    if module == _HEAD:
        return quantization.quantizes_head
    return len(shape) == 2 and module != _EMBEDDING and not module.endswith(_ROUTER)


def _why_plain(module: str, quantization: Quantization | None) -> str:
    if quantization is None:
        return "config.json has no quantization_config"
    if entry := quantization.excluding(module):
        return f"{entry} in {quantization.list_name} excludes {module} from quantization"
    return f"vLLM keeps {module} unquantized with {quantization.method}"


def _check_ignore_list(quantization: Quantization, modules: Iterable[str]) -> None:
    entries = [entry for entry in quantization.ignored if not is_other_part(entry.removeprefix("re:").strip(".*^$"))]
    if entries and not any(quantization.excluding(module) for module in modules):
        raise CheckpointError(
            f"{quantization.list_name} excludes {entries[0]} and matches no module of the model; write its entries as "
            "the weights are called, such as language_model.lm_head"
        )


def _check_fused_layers(linears: Iterable[str], weights: Mapping[str, Stored], quantization: Quantization) -> None:
    layers = defaultdict(list)
    for module in sorted(linears):
        layers[fused_layer(module)].append(module)
    for layer, parts in layers.items():
        excluded = [part for part in parts if quantization.excluding(part)]
        if excluded and len(excluded) < len(parts):
            rest = next(part for part in parts if part not in excluded)
            raise CheckpointError(
                f"{quantization.list_name} excludes {excluded[0]} but not {rest}, which are one layer, {layer}, in the "
                "engine; exclude all of its parts or none"
            )
        first = weights[parts[0]]
        if other := next((weights[part] for part in parts if weights[part].dtype != first.dtype), None):
            raise CheckpointError(
                f"{first.name} is {first.dtype} and {other.name} is {other.dtype}, but they are one layer, {layer}, in "
                "the engine; quantize all of its parts or none"
            )
        has_index = any("index_" in part for part in parts)
        if has_index and not excluded and quantization.block is None:
            raise CheckpointError(
                f"{first.name} has one scale for the whole tensor, which vLLM cannot load into a projection fused with "
                "an index branch; quantize it as MXFP8 or in blocks of 128 x 128, or exclude q, k, v, index_q and "
                "index_k of all sparse layers"
            )


def _check_scale(module: str, weight: Stored, found: Mapping[str, Stored], quantization: Quantization) -> None:
    if weight.dtype != QUANTIZED:
        raise CheckpointError(
            f"{weight.name} is {weight.dtype}, but {quantization.method} makes it {QUANTIZED} and nothing in "
            f"{quantization.list_name} excludes {module}; add it to the list, or quantize the weight"
        )
    names = [f"{module}.{scale}" for scale in WEIGHT_SCALES]
    scales = [found[name] for name in names if name in found]
    if not scales:
        raise missing_scale(weight.name, WEIGHT_SCALES)
    if len(scales) > 1:
        raise CheckpointError(
            f"{weight.name} has two scales, {scales[0].name} and {scales[1].name}; remove the one that it was not "
            "quantized with"
        )
    (scale,) = scales
    if scale.dtype not in quantization.scale_dtypes:
        raise CheckpointError(
            f"{scale.name} is {scale.dtype}, but scales of {quantization.method} are "
            f"{' or '.join(quantization.scale_dtypes)}; quantize the checkpoint again"
        )
    shape = quantization.scale_shape(weight.shape)
    if scale.shape != shape and (shape or scale.shape != (1,)):
        raise CheckpointError(
            f"{scale.name} has the shape {list(scale.shape)}, but {quantization.method} makes it {list(shape)} for a "
            f"weight of {list(weight.shape)}; take config.json and weights from the same checkpoint"
        )
    activations = f"{module}.input_scale"
    if quantization.block is not None and activations in found:
        raise CheckpointError(
            f"{found[activations].name} is a scale of activations, but {quantization.method} scales them as it "
            "computes; remove it from the checkpoint"
        )
