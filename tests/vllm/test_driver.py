"""How the suite starts vLLM where it was laid in place by hand, and where other engines run on the same GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ..engines.capabilities import Can
from ..engines.drivers import base, vllm
from ..engines.drivers.options import Options


@pytest.mark.parametrize("installed", [True, False])
def test_a_server_starts_with_the_script_or_without(
    installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    if installed:
        (tmp_path / "vllm").touch()
    command = [str(word) for word in vllm.VLLM().serve_command(Path("model"))]
    assert command[-2:] == ["serve", "model"]
    assert command[:-2] == ([str(tmp_path / "vllm")] if installed else [*vllm.MODULE])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_engines_on_one_gpu_leave_each_other_room(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "DEVICE", device)
    given = vllm.VLLM().arguments(Path("model"), Options())
    room = {"gpu_memory_utilization", "max_cudagraph_capture_size"}
    assert room & given.keys() == (room if device == "cuda" else set())
    chosen = vllm.VLLM().arguments(Path("model"), Options(own={"gpu_memory_utilization": 0.5}))
    assert chosen["gpu_memory_utilization"] == 0.5


@pytest.mark.parametrize("gpus", [1, 2])
def test_two_ranks_need_two_gpus(gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "gpus", lambda: gpus)
    assert (Can.TENSOR_PARALLEL in vllm.VLLM().lacks("cuda", "bfloat16")) == (gpus == 1)
    assert Can.TENSOR_PARALLEL not in vllm.VLLM().lacks("cpu", "float32")
