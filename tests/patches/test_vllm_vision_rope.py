"""patches/vllm_vision_rope.py: the rope of the tower in torch, and that it takes Triton's place."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from msa_backend.patches import APPLIED
from msa_backend.patches.vllm_vision_rope import PATCH, angles, rotate

HEADS, HEAD_SIZE, SECTIONS = 3, 32, [5, 5, 5]
ROTARY = 2 * sum(SECTIONS)
GRIDS = [[1, 4, 6], [3, 2, 2]]
PATCHES = 36
THETA = 10_000.0


@pytest.mark.usefixtures("vllm")
def test_it_takes() -> None:
    pytest.importorskip("torchvision")
    from vllm.models.minimax_m3.common import vision_tower

    PATCH.apply()
    PATCH.apply()
    assert PATCH.status() == APPLIED
    assert (vision_tower.vit_mrope_setup, vision_tower.triton_mrope) == (angles, rotate)


@pytest.mark.usefixtures("vllm")
def test_it_takes_where_the_angles_are_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in vLLM 0.33, where the tower makes one for itself."""
    pytest.importorskip("torchvision")
    from vllm.model_executor import custom_op
    from vllm.models.minimax_m3.common import vision_tower

    class VitMropeSetup(custom_op.PluggableLayer):
        def forward(self, inv_freq_t, inv_freq_h, inv_freq_w, grid_thw, spatial_merge_size):
            raise AssertionError("Triton has no CPU")

    def triton_mrope(
        q, k, cos, sin, mrope_section, head_size, rotary_dim, mrope_interleaved, is_neox_style
    ) -> None: ...

    monkeypatch.setattr(custom_op, "op_registry_oot", {})
    monkeypatch.setattr(vision_tower, "VitMropeSetup", VitMropeSetup, raising=False)
    monkeypatch.setattr(vision_tower, "triton_mrope", triton_mrope)
    PATCH.apply()
    PATCH.apply()
    assert PATCH.status() == APPLIED
    inverse = torch.ones(1)
    for found, expected in zip(
        vision_tower.VitMropeSetup()(inverse, inverse, inverse, GRIDS, 2),
        angles(inverse, inverse, inverse, GRIDS, 2),
        strict=True,
    ):
        assert torch.equal(found, expected)


def rope() -> tuple[torch.Tensor, torch.Tensor]:
    inverse = THETA ** -(torch.arange(SECTIONS[0]) / SECTIONS[0])
    return angles(inverse, inverse, inverse, GRIDS, 2)


def states(seed: int) -> torch.Tensor:
    """Of queries or keys as the tower has them: rows of a wider projection."""
    wide = torch.randn(PATCHES, 3 * HEADS * HEAD_SIZE, generator=torch.Generator().manual_seed(seed))
    return wide[:, HEADS * HEAD_SIZE : 2 * HEADS * HEAD_SIZE]


def rotate_in_place(q: torch.Tensor, k: torch.Tensor, **how: Any) -> None:
    style = {"mrope_interleaved": False, "is_neox_style": True} | how
    rotate(q, k, *rope(), SECTIONS, HEAD_SIZE, ROTARY, **style)


def test_patches_are_turned_by_frame_row_and_column() -> None:
    """Each pair of channels as a complex number, turned by the position on its axis; patch by patch, from the text."""
    positions = [
        (frame, row + inner_row, column + inner_column)
        for frames, rows, columns in GRIDS
        for frame in range(frames)
        for row in range(0, rows, 2)
        for column in range(0, columns, 2)
        for inner_row in range(2)
        for inner_column in range(2)
    ]
    q, k = states(0), states(1)
    before = [part.clone().unflatten(1, (HEADS, HEAD_SIZE)) for part in (q, k)]
    rotate_in_place(q, k)
    for found, original in zip((q, k), before, strict=True):
        expected = original.clone()
        for patch, position in enumerate(positions):
            turn = torch.tensor([at * THETA ** -(i / SECTIONS[0]) for at in position for i in range(SECTIONS[0])])
            half = ROTARY // 2
            pairs = torch.complex(original[patch, :, :half], original[patch, :, half:ROTARY])
            turned = pairs * torch.polar(torch.ones(half), turn)
            expected[patch, :, :ROTARY] = torch.cat((turned.real, turned.imag), dim=-1)
        torch.testing.assert_close(found, expected.flatten(1))


def test_bf16_is_rotated_in_fp32() -> None:
    q, k = states(0).bfloat16(), states(1).bfloat16()
    exact_q, exact_k = q.float(), k.float()
    rotate_in_place(q, k)
    rotate_in_place(exact_q, exact_k)
    assert torch.equal(q, exact_q.bfloat16())
    assert torch.equal(k, exact_k.bfloat16())


@pytest.mark.parametrize("other", [{"mrope_interleaved": True}, {"is_neox_style": False}])
def test_other_arrangements_are_refused(other: dict[str, bool]) -> None:
    with pytest.raises(NotImplementedError, match="not MiniMax-M3's"):
        rotate_in_place(states(0), states(1), **other)
