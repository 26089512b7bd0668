"""Drafts by an EAGLE3 head, vLLM's own Llama, from the hidden states that our target hands over."""

from __future__ import annotations

from pathlib import Path

import pytest

from .. import oracle
from ..compare import assert_true
from ..engines.drivers import DRIVER
from .accepted import Accepted
from .draft_models import EQUAL_TAPS, write_eagle3_draft, write_eagle3_target

PROMPTS = [oracle.random_prompt(length, seed=1) for length in (127, 300, 700, 1300)]
CACHED = [0, 128, 512, 1152]
NEW_TOKENS = 48


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_eagle3_target(tmp_path_factory.mktemp("eagle3") / "target")


# The draft is right only if its first and its last tap are one hidden state, as all before layers 0 to 4 are; before
# layer 5 and later there are others. Layer 0 is tapped before anything is added to it, the default are 2, 3 and 4.
@pytest.mark.parametrize("taps", [None, [0, 2, EQUAL_TAPS]], ids=["default", "own"])
def test_drafts_from_the_right_layers(target: Path, taps: list[int] | None, tmp_path: Path):
    """The answers are the target's, and drafts are accepted at each place as often as the answer is a successor.

    0.77, 0.72 and 0.79 of those that were reached; none at all with the last tap one layer later.
    """
    draft = write_eagle3_draft(tmp_path / "draft", target, taps)
    own = {"speculative_config": {"method": "eagle3", "model": str(draft), "num_speculative_tokens": 3}}
    with DRIVER.engine(target, prefix_caching=True, chunk=256, own=own) as engine:
        answers = engine.ask(PROMPTS, NEW_TOKENS)
        accepted = Accepted.read(engine.llm)
        again = engine.ask(PROMPTS, NEW_TOKENS)
        accepted_again = Accepted.read(engine.llm).since(accepted)
    for found in (accepted, accepted_again):
        print(found, found.rates)
        assert all(0.6 < rate < 1 for rate in found.rates)
    assert [answer.cached for answer in again] == CACHED
    truth = oracle.load(target)
    for prompt, answer, repeated in zip(PROMPTS, answers, again, strict=True):
        assert_true(answer, prompt, truth)
        assert repeated.tokens == answer.tokens
