"""Which implementation runs where, and that one sentence says why."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

from msa_backend.kernels import cpu, dispatch


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    dispatch.choose.cache_clear()
    yield
    dispatch.choose.cache_clear()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    return torch.device("cuda")


def test_a_cpu():
    choice = dispatch.choose(torch.device("cpu"))
    assert choice.module is cpu
    assert not choice.is_triton
    assert "this is cpu" in choice.why


@pytest.mark.parametrize(("capability", "triton"), [((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)])
def test_an_nvidia_gpu(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, capability: tuple[int, int], triton: bool
):
    gpu = pytest.importorskip("msa_backend.kernels.gpu", reason="needs triton")
    monkeypatch.setattr(gpu.arch, "capability", lambda device: capability)
    choice = dispatch.choose(device)
    assert choice.is_triton is triton
    assert choice.module is (gpu if triton else cpu)
    assert (
        f"some GPU, SM{capability[0]}{capability[1]}" in choice.why or "need SM80, and some GPU is SM75" in choice.why
    )


def test_without_triton(monkeypatch: pytest.MonkeyPatch, device: torch.device):
    monkeypatch.setitem(sys.modules, "msa_backend.kernels.gpu", None)
    choice = dispatch.choose(device)
    assert choice.module is cpu
    assert "install triton" in choice.why


def test_an_amd_gpu(monkeypatch: pytest.MonkeyPatch, device: torch.device):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert dispatch.choose(device).module is cpu
