"""The vision half of a MiniMax-M3 checkpoint, in any of its three forms: config, names and shapes.

Canonical names are those of the original form, without the ``vision_tower.`` in front of the tower's own.
Free of every engine.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from msa_backend.config import MSAConfigError, require

from .config import text_section
from .weights import CheckpointError, is_quantization_scale, missing_weights, unknown_weights

if TYPE_CHECKING:
    from torch import Tensor

_RENAMES = (
    (re.compile(r"^(?:model\.)?vision_tower\.(?:vision_model\.)?"), "vision_model."),
    (re.compile(r"^vision_model\.embeddings\.proj\."), "vision_model.embeddings.patch_embedding."),
    (re.compile(r"^vision_model\.layers\."), "vision_model.encoder.layers."),
    (re.compile(r"\.block_sparse_moe\.(?=fc[12]\.)"), ".mlp."),
    (re.compile(r"^model\.multi_modal_projector\.merge_linear_"), "patch_merge_mlp.linear_"),
    (re.compile(r"^model\.multi_modal_projector\."), "multi_modal_projector."),
)


@dataclass(frozen=True)
class VisionConfig:
    """The tower, the projector behind it and the merger that makes one token of neighbouring patches.

    Attributes:
        hidden_size, intermediate_size: widths of the tower.
        num_layers: of the tower.
        num_channels: of an image.
        patch_size: pixels of a patch's side.
        temporal_patch_size: frames of a patch; an image counts as that many equal ones.
        merge_size: patches of a token's side.
        rope_theta: of the tower's rope over time, height and width.
        projector_size: inner width of projector and merger.
        text_hidden_size: width of a token.
        section: ``vision_config`` as it is in ``config.json``.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_channels: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    rope_theta: float
    projector_size: int
    text_hidden_size: int
    section: Mapping[str, Any]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> VisionConfig:
        """Read a whole ``config.json``, in the original form or in that of ``transformers``.

        Raises:
            MSAConfigError: it has no vision section, or that lacks a key.
        """
        section = config.get("vision_config")
        if not section:
            raise MSAConfigError("config.json lacks vision_config, which images need; pass --language-model-only")
        compression = section.get("img_token_compression_config") or section
        rope = section.get("rope_parameters") or {}
        text = text_section(config)
        return cls(
            hidden_size=require(section, "hidden_size"),
            intermediate_size=require(section, "intermediate_size"),
            num_layers=require(section, "num_hidden_layers"),
            num_channels=section.get("num_channels", 3),
            patch_size=require(section, "patch_size"),
            temporal_patch_size=compression.get("temporal_patch_size", 2),
            merge_size=compression.get("spatial_merge_size", 2),
            rope_theta=section.get("rope_theta") or rope.get("rope_theta") or 10_000.0,
            projector_size=config.get("projector_hidden_size") or require(text, "hidden_size"),
            text_hidden_size=require(text, "hidden_size"),
            section=section,
        )

    def original_section(self) -> dict[str, Any]:
        """``vision_config`` with the keys that the original form has and that of ``transformers`` calls otherwise."""
        compression = {"spatial_merge_size": self.merge_size, "temporal_patch_size": self.temporal_patch_size}
        return {
            **self.section,
            "num_channels": self.num_channels,
            "rope_theta": self.rope_theta,
            "img_token_compression_config": compression,
        }


def canonical_vision_name(name: str) -> str:
    """The one name of a vision weight, whichever form it comes from."""
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name


def canonical_vision_weights(
    weights: Iterable[tuple[str, Tensor]], config: VisionConfig
) -> Iterator[tuple[str, Tensor]]:
    """Rename and check a stream of vision tensors.

    Yields:
        Each vision weight once, under its canonical name.

    Raises:
        CheckpointError: a weight the config has no place for or one that is there twice (at once), or weights that
            never came (when the stream ends); a weight is quantized.
    """
    missing = set(expected := expected_vision_shapes(config))
    for name, tensor in weights:
        canonical = canonical_vision_name(name)
        if tensor.element_size() == 1 or is_quantization_scale(canonical, expected):
            raise quantized_vision(name)
        if canonical not in expected:
            raise unknown_weights([name])
        if canonical not in missing:
            raise CheckpointError(f"the checkpoint holds {canonical} twice, the second time as {name}")
        missing.remove(canonical)
        yield canonical, tensor
    if missing:
        raise missing_weights(missing)


def quantized_vision(name: str) -> CheckpointError:
    """What to say of ``name``, a quantized vision weight or the scale of one."""
    return CheckpointError(
        f"{name} is of a quantized vision half, but images are served with an unquantized one; take a checkpoint that "
        "quantizes the text model alone, or pass --language-model-only"
    )


def expected_vision_shapes(config: VisionConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name and shape of every vision weight."""
    hidden = config.hidden_size
    patch = (config.num_channels, config.temporal_patch_size, config.patch_size, config.patch_size)
    shapes: dict[str, tuple[int, ...]] = {"vision_model.embeddings.patch_embedding.weight": (hidden, *patch)}

    def with_bias(prefix: str, *shape: int) -> None:
        shapes[f"{prefix}.weight"], shapes[f"{prefix}.bias"] = shape, shape[:1]

    with_bias("vision_model.pre_layrnorm", hidden)
    for index in range(config.num_layers):
        layer = f"vision_model.encoder.layers.{index}"
        for norm in ("layer_norm1", "layer_norm2"):
            with_bias(f"{layer}.{norm}", hidden)
        for matrix in ("q_proj", "k_proj", "v_proj", "out_proj"):
            with_bias(f"{layer}.self_attn.{matrix}", hidden, hidden)
        with_bias(f"{layer}.mlp.fc1", config.intermediate_size, hidden)
        with_bias(f"{layer}.mlp.fc2", hidden, config.intermediate_size)
    merged = config.text_hidden_size * config.merge_size**2
    for prefix, width in (("multi_modal_projector", hidden), ("patch_merge_mlp", merged)):
        with_bias(f"{prefix}.linear_1", config.projector_size, width)
        with_bias(f"{prefix}.linear_2", config.text_hidden_size, config.projector_size)
    return shapes
