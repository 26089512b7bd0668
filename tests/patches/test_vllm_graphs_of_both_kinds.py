"""Which graphs a step finds under cudagraph_mode FULL; capturing them needs a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from msa_backend.patches.vllm_graphs_of_both_kinds import PATCH

SIZES = [1, 2, 4, 8, 16]


@pytest.fixture
def make(vllm: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A manager as vLLM makes it for the model, or for its drafts, without a device."""
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager, ModelCudaGraphManager

    monkeypatch.setattr(CudaGraphManager, "_init_candidates", CudaGraphManager._init_candidates)
    PATCH.apply()

    def make_manager(mode: Any, decode_query_len: int = 1, of: Any = ModelCudaGraphManager) -> Any:
        manager = object.__new__(of)
        manager.compilation_config = SimpleNamespace(cudagraph_capture_sizes=SIZES, max_cudagraph_capture_size=16)
        cache = SimpleNamespace(use_kda_recoverssm=False)
        manager.vllm_config = SimpleNamespace(speculative_config=None, cache_config=cache)
        manager.max_num_reqs, manager.decode_query_len = 8, decode_query_len
        manager.cudagraph_mode, manager.varlen_decode = mode, False
        manager.lora_capture_cases, manager.ubatch_runner = [0], None
        manager._candidates, manager._capture_descs = {}, {}
        manager._lora_dispatch_map, manager._max_lora_case = {}, 0
        manager._graphs_captured = True
        manager._init_candidates()
        return manager

    return make_manager


@pytest.mark.parametrize("query_len", [1, 4])
def test_decode_finds_its_own_and_any_mix_the_other(make: Any, query_len: int) -> None:
    from vllm.config.compilation import CUDAGraphMode

    manager = make(CUDAGraphMode.FULL, query_len)
    decode = manager.dispatch(2, 2 * query_len, query_len, 0)
    mixed = manager.dispatch(2, 2 * query_len, None, 0)
    assert (decode.cg_mode, mixed.cg_mode) == (CUDAGraphMode.FULL, CUDAGraphMode.FULL)
    assert (decode.uniform_token_count, mixed.uniform_token_count) == (query_len, None)
    captured = manager._capture_descs[CUDAGraphMode.FULL]
    assert {decode, mixed} <= set(captured)
    assert len(set(captured)) == len(captured)
    # vLLM captures the largest first, whose memory the others then use.
    assert [desc.num_tokens for desc in captured] == sorted((desc.num_tokens for desc in captured), reverse=True)
    assert manager.cudagraph_mode == CUDAGraphMode.FULL
    # More decoding requests than a decode graph takes are a mix as well.
    assert manager.dispatch(8, 16, 2, 0).uniform_token_count is None


def test_the_first_step_of_a_draft_has_the_shape_of_its_target(make: Any) -> None:
    """It replays over attention metadata that were made for the target's step: a graph of another shape reads what
    nobody wrote, which killed an engine with EAGLE3 on a GPU."""
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.worker.gpu.spec_decode.target_dependent_ar.cudagraph_utils import SpeculatorCudaGraphManager

    target, draft = make(CUDAGraphMode.FULL, 4), make(CUDAGraphMode.FULL, 4, SpeculatorCudaGraphManager)
    for step in ((1, 4, 4, 0), (3, 12, 4, 0), (3, 12, None, 0), (2, 5, None, 0), (8, 16, 2, 0)):
        assert draft.dispatch(*step) == target.dispatch(*step), step


def test_other_modes_are_left_alone(make: Any) -> None:
    from vllm.config.compilation import CUDAGraphMode

    manager = make(CUDAGraphMode.FULL_AND_PIECEWISE)
    assert manager.dispatch(2, 2, 1, 0).cg_mode == CUDAGraphMode.FULL
    assert manager.dispatch(2, 8, None, 0).cg_mode == CUDAGraphMode.PIECEWISE
