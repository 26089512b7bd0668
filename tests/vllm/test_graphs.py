"""The mode of CUDA graphs that a server starts with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config.compilation import CUDAGraphMode

from msa_backend.vllm import graphs


def config(mode: Any, v2: bool = True) -> Any:
    return SimpleNamespace(compilation_config=SimpleNamespace(cudagraph_mode=mode), use_v2_model_runner=v2)


@pytest.mark.parametrize(
    ("cuda", "given", "chosen"),
    [
        (True, config(None), CUDAGraphMode.FULL),
        (True, config(CUDAGraphMode.NONE), CUDAGraphMode.NONE),
        (True, config(CUDAGraphMode.PIECEWISE), CUDAGraphMode.PIECEWISE),
        (True, config(None, v2=False), None),
        (False, config(None), None),
    ],
    ids=["left to us", "the user wants none", "the user wants another", "the first model runner", "a CPU"],
)
def test_full_unless_the_user_chose(cuda: bool, given: Any, chosen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "current_platform", SimpleNamespace(is_cuda=lambda: cuda))
    graphs.choose(given)
    assert given.compilation_config.cudagraph_mode == chosen
