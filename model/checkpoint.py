"""Check the files of a local checkpoint before anything is loaded from them. Free of every engine.

Only the safetensors headers are read, so this costs milliseconds where loading costs minutes, and a damaged
download is one sentence at start-up instead of a stack trace from a worker process.
"""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .cache_scales import check_cache_scales
from .config import M3Config
from .mtp import check_mtp_shapes
from .quantization import read_quantization
from .quantized import PLAIN, Stored, check_quantized
from .vision import VisionConfig, canonical_vision_name, expected_vision_shapes, quantized_vision
from .weights import (
    CheckpointError,
    Part,
    canonical_parts,
    check_expert_count,
    expected_shapes,
    is_cache_scale,
    is_quantization_scale,
    is_vision_weight,
    missing_weights,
    unknown_weights,
)

logger = logging.getLogger(__name__)

_INDEX = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself


def check_checkpoint(
    folder: Path, config: M3Config, vision: VisionConfig | None = None, *, fp8_cache: bool = False
) -> None:
    """Check that ``folder`` holds exactly the weights that are asked for, whole.

    A folder without safetensors files is left to the engine's own loader. Scales of an fp8 cache are ignored with a
    warning unless there is one: they change no weight, and a cache in the model's dtype does not need them.

    Args:
        config: of the text model.
        vision: of the vision half; None where it is not served, and its weights are passed over.
        fp8_cache: whether K and V will be kept in fp8.

    Raises:
        CheckpointError: a shard is missing, truncated or unreadable; a weight is missing, unknown or has
            another shape than the config gives it; a quantized weight is not what ``quantization_config`` says, or
            its scale is missing or of another form; a vision weight is quantized; the scales of an fp8 cache do not
            fit the layers.
    """
    quantization = read_quantization(folder)
    text = expected_shapes(config)
    vision_half = expected_vision_shapes(vision) if vision is not None else {}
    expected = text | vision_half
    found: dict[str, Stored] = {}
    unknown: list[str] = []
    cache_scales: list[Stored] = []
    for shard in _shards(folder):
        for name, tensor in _read_header(shard).items():
            if is_cache_scale(name):
                cache_scales.append(Stored(name, tensor.dtype, tensor.shape))
            parts = _parts(name, config, vision)
            check_expert_count(name, parts, tensor.shape, config)
            for part in parts:
                is_scale = is_quantization_scale(part.name, expected)
                if is_vision_weight(name) and (is_scale or tensor.dtype not in PLAIN):
                    raise quantized_vision(name)
                actual = part.shape(tensor.shape)
                if part.name not in expected:
                    if not is_scale:
                        unknown.append(name)
                elif actual != expected[part.name]:
                    raise CheckpointError(
                        f"{name} in {shard.name} has the shape {list(tensor.shape)}, which makes {part.name} "
                        f"{list(actual)}, but config.json makes it {list(expected[part.name])}; they belong to "
                        "different models"
                    )
                found[part.name] = Stored(name, tensor.dtype, actual)
    if not found:
        return
    if unknown:
        raise unknown_weights(set(unknown))
    if missing := expected.keys() - found.keys():
        raise missing_weights(missing)
    check_quantized({name: found[name] for name in found.keys() - vision_half.keys()}, text, quantization)
    if fp8_cache:
        check_cache_scales(cache_scales, config)
    elif cache_scales:
        logger.warning(
            "The checkpoint holds scales of an fp8 KV cache (%s, %d in all), which a cache in the model's dtype does "
            "not need; they are ignored.",
            min(scale.name for scale in cache_scales),
            len(cache_scales),
        )


def _parts(name: str, config: M3Config, vision: VisionConfig | None) -> list[Part]:
    if vision is not None and is_vision_weight(name):
        return [Part(canonical_vision_name(name))]
    return canonical_parts(name, config)


def check_mtp_checkpoint(folder: Path, config: M3Config, modules: int) -> None:
    """Check that ``folder`` holds exactly the weights of ``modules`` MTP modules, besides whatever else it holds.

    A folder without safetensors files is left to the engine's own loader.

    Raises:
        CheckpointError: a shard is missing, truncated or unreadable; there are no MTP weights, or one is missing,
            unknown or has another shape than the config gives it.
    """
    found = {name: tensor.shape for shard in _shards(folder) for name, tensor in _read_header(shard).items()}
    if found:
        check_mtp_shapes(found, config, modules)


def _shards(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(
            f"{_INDEX} names {absent[0]}"
            + (f" and {len(absent) - 1} more files" if len(absent) > 1 else "")
            + f", which {folder} does not hold; download the checkpoint again"
        )
    return [folder / name for name in names]


class _Entry(NamedTuple):
    """A tensor as the header of its file describes it."""

    dtype: str
    shape: tuple[int, ...]


def _read_header(shard: Path) -> dict[str, _Entry]:
    """Every tensor in a safetensors file by its name, once the file's length has been checked."""
    size = shard.stat().st_size
    with shard.open("rb") as file:
        prefix = file.read(8)
        header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 0 < header_bytes <= min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(f"{shard.name} is truncated or no safetensors file; download it again")
        try:
            header: Mapping[str, Any] = json.loads(file.read(header_bytes))
        except ValueError as error:
            raise CheckpointError(f"{shard.name} has an unreadable header; download it again") from error
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    end = 8 + header_bytes + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    if size < end:
        raise CheckpointError(
            f"{shard.name} is truncated: it has {size:,} bytes, but its header announces {end:,}; download it again"
        )
    return {name: _Entry(entry["dtype"], tuple(entry["shape"])) for name, entry in tensors.items()}
