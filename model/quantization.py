"""What a checkpoint's ``quantization_config`` says: which weights are quantized, and how their scales lie.

Free of every engine. Ignore lists are read as vLLM reads them, since a list that an engine understands otherwise than
the tool that wrote it ends in weights that load as garbage.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .config import text_section
from .weights import CheckpointError, without_wrapper

SERVED = (
    "mxfp8 (or modelopt with quant_algo MXFP8), fp8 and compressed-tensors float-quantized, "
    "with blocks of 128 x 128 or one scale a tensor"
)
_FUSED = (
    (re.compile(r"\.(?:index_)?[qkv]_proj$"), ".qkv_proj"),
    (re.compile(r"\.(?:gate|up)_proj$"), ".gate_up_proj"),
    (re.compile(r"\.experts\.\d+\.w[123]$"), ".experts"),
)


def fused_layer(module: str) -> str:
    """The layer of the engine that ``module`` of the checkpoint is a part of; often itself."""
    for pattern, name in _FUSED:
        module = pattern.sub(name, module)
    return module


def _equals(entry: str, module: str) -> bool:
    layer = fused_layer(module)
    # An entry that names one expert excludes all of its layer.
    return entry in (module, layer) or (layer.endswith(".experts") and layer in entry)


def _contains_or_globs(entry: str, module: str) -> bool:
    layer = fused_layer(module)
    return _equals(entry, module) or entry in layer or fnmatchcase(layer, entry)


def _equals_or_regex(entry: str, module: str) -> bool:
    return bool(re.match(entry[3:], module)) if entry.startswith("re:") else entry == module


@dataclass(frozen=True)
class Quantization:
    """One way to quantize a checkpoint to 8-bit floats (E4M3).

    Attributes:
        method: for sentences.
        block: rows and columns of a weight that share a scale; None for one scale a tensor.
        scale_dtypes: of the scales, as safetensors names them.
        quantizes_head: whether ``lm_head`` is quantized unless excluded; otherwise it never is.
        list_name: what ``quantization_config`` calls the ignore list.
        ignored: its entries, without the prefix of the whole model.
        matches: whether an entry excludes a module of the checkpoint.
    """

    method: str
    block: tuple[int, int] | None
    scale_dtypes: tuple[str, ...]
    quantizes_head: bool
    list_name: str
    ignored: tuple[str, ...]
    matches: Callable[[str, str], bool]

    def excluding(self, module: str) -> str | None:
        """The entry of the ignore list that excludes ``module``, a canonical weight's name without ``.weight``."""
        return next((entry for entry in self.ignored if self.matches(entry, module)), None)

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scales of a weight of ``shape [N, K]``."""
        if self.block is None:
            return ()
        return tuple(math.ceil(size / part) for size, part in zip(shape, self.block, strict=True))


def read_quantization(folder: Path) -> Quantization | None:
    """How the checkpoint in ``folder`` is quantized; None if it is not, or has no ``config.json``.

    Raises:
        CheckpointError: it is quantized in a way that is not served.
    """
    section = quantization_section(_json(folder / "config.json"))
    if not section and (modelopt := _json(folder / "hf_quant_config.json")):
        section = {"quant_method": "modelopt"} | modelopt
    return parse_quantization(section) if section else None


def quantization_section(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The ``quantization_config`` of a whole ``config.json``; empty if it has none."""
    return raw.get("quantization_config") or text_section(raw).get("quantization_config") or {}


def section_of(hf_config: Any) -> Mapping[str, Any]:
    """The ``quantization_config`` of a config that an engine has parsed; empty if it has none."""
    return getattr(hf_config, "quantization_config", None) or {}


def parse_quantization(section: Mapping[str, Any]) -> Quantization:
    """Read a ``quantization_config``.

    Raises:
        CheckpointError: it describes what is not served.
    """
    method = section.get("quant_method")
    nested = section.get("quantization") or section
    if method == "mxfp8":
        return _mxfp8("mxfp8", "ignored_layers", section)
    if method == "modelopt" and str(nested.get("quant_algo")).upper() == "MXFP8":
        return _mxfp8("modelopt MXFP8", "exclude_modules" if "exclude_modules" in nested else "ignore", nested)
    if method == "fp8":
        name = "ignored_layers" if section.get("ignored_layers") else "modules_to_not_convert"
        return _fp8("fp8", section.get("weight_block_size"), name, section, _equals)
    if method == "compressed-tensors":
        return _fp8("compressed-tensors", _compressed_block(section), "ignore", section, _equals_or_regex)
    raise _not_served("quant_method", f"{method} {nested.get('quant_algo', '')}".rstrip())


def _mxfp8(method: str, list_name: str, section: Mapping[str, Any]) -> Quantization:
    # vLLM takes a star at the end for "this module and all below it".
    entries = [
        part
        for entry in _entries(section, list_name)
        for part in ((entry[:-1], f"{entry[:-1]}.*") if re.search(r"[^.]\*$", entry) else (entry,))
    ]
    return Quantization(method, (1, 32), ("U8",), True, list_name, tuple(entries), _contains_or_globs)


def _fp8(
    method: str, block: Any, list_name: str, section: Mapping[str, Any], matches: Callable[[str, str], bool]
) -> Quantization:
    if block not in (None, [128, 128]):
        raise _not_served("the block of quantization_config", block)
    shared = (128, 128) if block else None
    # Any float converts to the float32 that the engines keep.
    return Quantization(method, shared, ("F32", "BF16"), False, list_name, _entries(section, list_name), matches)


def _compressed_block(section: Mapping[str, Any]) -> Any:
    groups = list((section.get("config_groups") or {}).values())
    if len(groups) != 1 or groups[0].get("targets") != ["Linear"]:
        raise _not_served("config_groups", f"{len(groups)} groups or other targets than Linear")
    weights = groups[0].get("weights") or {}
    kind = (weights.get("num_bits"), weights.get("type"), weights.get("strategy"))
    if kind == (8, "float", "block"):
        return weights.get("block_structure")
    if kind == (8, "float", "tensor"):
        return None
    raise _not_served("weights of config_groups", " ".join(map(str, kind)))


def _entries(section: Mapping[str, Any], list_name: str) -> tuple[str, ...]:
    return tuple(without_wrapper(entry) for entry in section.get(list_name) or ())


def _not_served(what: str, found: object) -> CheckpointError:
    return CheckpointError(
        f"{what} is {found}, but msa-backend knows {SERVED}; serve such a checkpoint, or one that is not quantized"
    )


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
