"""Rotate the queries and keys of MiniMax-M3's vision tower in torch, where there is no GPU for Triton."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import APPLIED, NOT_NEEDED, Patch, PatchError

if TYPE_CHECKING:
    from torch import Tensor

_TOWER = "vllm.models.minimax_m3.common.vision_tower"
_ANGLES = "inv_freq_t inv_freq_h inv_freq_w grid_thw spatial_merge_size"
_ROTATE = "q k cos sin mrope_section head_size rotary_dim mrope_interleaved is_neox_style"


def angles(
    inv_freq_t: Tensor,
    inv_freq_h: Tensor,
    inv_freq_w: Tensor,
    grid_thw: Sequence[Sequence[int]],
    spatial_merge_size: int,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of all patches.

    Args:
        inv_freq_t, inv_freq_h, inv_freq_w: fp32 ``[channels]``, of the pairs of channels that each axis rotates.
        grid_thw: of each image or video, its patches in time, height and width.
        spatial_merge_size: patches of a token's side. The patches of one token follow each other.

    Returns:
        Two fp32 views ``[3, patches, channels of all axes]``. A reader takes each axis's channels from a plane of its
        own, and all planes here are the same one.
    """
    import torch

    of_each = [_positions(frames, rows, columns, spatial_merge_size) for frames, rows, columns in grid_thw]
    positions = torch.cat(of_each).to(inv_freq_t)
    found = torch.cat(
        [positions[:, axis, None].to(inv) * inv for axis, inv in enumerate((inv_freq_t, inv_freq_h, inv_freq_w))],
        dim=-1,
    )
    return found.cos().expand(3, -1, -1), found.sin().expand(3, -1, -1)


def rotate(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    mrope_section: Sequence[int],
    head_size: int,
    rotary_dim: int,
    mrope_interleaved: bool,
    is_neox_style: bool,
) -> tuple[Tensor, Tensor]:
    """Rotate the first ``rotary_dim`` channels of every head, in halves and in place.

    Args:
        q, k: ``[patches, heads * head_size]``; rows may lie apart.
        cos, sin: fp32 ``[3, patches, rotary_dim // 2]``.
        mrope_section: how many channels come from each of the three planes, in their order.

    Raises:
        NotImplementedError: for another arrangement of channels than MiniMax-M3's.
    """
    import torch

    if mrope_interleaved or not is_neox_style:
        raise NotImplementedError("rope with interleaved axes or adjacent pairs is not MiniMax-M3's and not built here")
    sections = list(mrope_section)
    cos, sin = (
        torch.cat([part[axis] for axis, part in enumerate(plane.split(sections, dim=-1))], dim=-1)[:, None]
        for plane in (cos, sin)
    )
    for states in (q, k):
        rotated = states.unflatten(-1, (-1, head_size))[..., :rotary_dim]
        first, second = rotated.float().chunk(2, dim=-1)
        rotated.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))
    return q, k


def _positions(frames: int, rows: int, columns: int, merge: int) -> Tensor:
    """Frame, row and column of each patch, ``[patches, 3]``: frame by frame, and in a frame token by token."""
    import torch

    sizes = (frames, rows // merge, columns // merge, merge, merge)
    frame, row, column, inner_row, inner_column = torch.meshgrid(*map(torch.arange, sizes), indexing="ij")
    return torch.stack((frame, row * merge + inner_row, column * merge + inner_column), dim=-1).flatten(0, -2)


def _apply() -> None:
    """Take both functions for Triton's in the module of the tower, on a CPU."""
    from vllm.models.minimax_m3.common import vision_tower
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or vision_tower.triton_mrope is rotate:
        return
    layer = getattr(vision_tower, "VitMropeSetup", None)
    if layer is None:
        _check("vit_mrope_setup", getattr(vision_tower, "vit_mrope_setup", None), _ANGLES)
    else:
        _check("VitMropeSetup.forward", getattr(layer, "forward", None), f"self {_ANGLES}")
    _check("triton_mrope", getattr(vision_tower, "triton_mrope", None), _ROTATE)
    if layer is None:
        vision_tower.vit_mrope_setup = angles
    else:
        # From 0.33 on, where vLLM lets this half be replaced.
        _replace(layer)
    vision_tower.triton_mrope = rotate


def _check(name: str, found: Any, parameters: str) -> None:
    if found is None or " ".join(inspect.signature(found).parameters) != parameters:
        raise PatchError(PATCH, f"{name}({parameters.replace(' ', ', ')}) of {_TOWER} is gone or changed")


def _replace(layer: Any) -> None:
    class TorchMropeSetup(layer):
        def forward(self, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
            return angles(*arguments, **named)

    layer.register_oot(TorchMropeSetup)


def _status() -> str:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return f"{NOT_NEEDED}: Triton runs on this platform"
    # Applied by the model as it builds its tower; vLLM's start-up imports the module without building anything.
    tower: Any = sys.modules.get(_TOWER)
    if tower is not None and tower.triton_mrope is rotate:
        return APPLIED
    return f"{NOT_NEEDED}: no vision tower was built in this process"


PATCH = Patch(
    name="vllm_vision_rope",
    why=(
        "the vision tower launches two Triton kernels that have no other path, so on a CPU the engine starts and dies "
        "at the first image; the one that rotates is no layer that a plugin could replace, nor in vLLM 0.32 the other"
    ),
    checked_on=("vLLM 0.32", "vLLM 0.33"),
    retired_by="a path in torch in triton_mrope, or a layer around it as vLLM 0.33 has around vit_mrope_setup",
    apply=_apply,
    status=_status,
)
