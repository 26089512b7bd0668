"""vLLM's tensor-parallel ranks share the scoring of blocks and answer as one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from msa_backend.sharing import SWITCH
from msa_backend.vllm import sharing

from ..compare import assert_true
from ..engines.drivers import DRIVER
from ..prompts import LENGTHS, NEW_TOKENS, PROMPTS
from ..refusal import sentence

SOME = [PROMPTS[LENGTHS.index(length)] for length in (17, 640, 1300)]


def test_two_ranks(tiny: Path, truth: Any, monkeypatch: pytest.MonkeyPatch):
    """Prompts in chunks, with running requests among them; steps with shorter contexts are left alone."""
    monkeypatch.setenv(SWITCH, "600")
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # lets the ranks be asked what they do

    def shares(worker: Any) -> list[tuple[int, int, int]]:
        modules = worker.model_runner.get_model().modules()
        return [(m.sharing.rank, m.sharing.ranks, m.sharing.replicas) for m in modules if hasattr(m, "sharing")]

    with DRIVER.engine(tiny, ranks=2, chunk=256, mixed=True) as engine:
        assert engine.llm.collective_rpc(shares) == [[(0, 2, 1)] * 3, [(1, 2, 1)] * 3]
        answers = engine.ask(SOME, NEW_TOKENS, prompt_logprobs=True)
    for answer, prompt in zip(answers, SOME, strict=True):
        assert_true(answer, prompt, truth)


@pytest.mark.parametrize(("given", "ranks", "refused"), [("600", 2, True), ("600", 1, False), ("0", 2, False)])
def test_not_yet_on_a_gpu(given: str, ranks: int, refused: bool, monkeypatch: pytest.MonkeyPatch):
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    monkeypatch.setenv(SWITCH, given)
    config: Any = SimpleNamespace(parallel_config=SimpleNamespace(tensor_parallel_size=ranks))
    if refused:
        assert "MSA_SHARED_SCORING is set, but msa-backend is tested with" in sentence(sharing.check_sharing, config)
    else:
        sharing.check_sharing(config)
