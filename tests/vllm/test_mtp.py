"""Drafts by MiniMax-M3's own MTP module, in checkpoints where it is known how many of them are right.

The answers are held against ``transformers``, which has no MTP: drafts may change what an answer costs, not what it is.
That would hold for any drafts whatever, so how many are accepted is looked at beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from msa_backend.tiny import TinyShape, write_tiny_checkpoint

from .. import oracle
from ..compare import Answer, assert_true
from ..engines.drivers import DRIVER
from ..prompts import MANY
from .accepted import Accepted
from .draft_models import write_clone, write_own, write_rejected

PROMPTS = [oracle.random_prompt(length, seed=1) for length in (127, 300, 700, 1300)]
# Of each in the cache once it has been asked: whole pages, less the last, which vLLM drops for the drafts' sake.
CACHED = [0, 128, 512, 1152]
NEW_TOKENS = 48


class Drafted(NamedTuple):
    """What an engine answered, and what was accepted of its drafts, before and after prefixes came from the cache."""

    answers: list[Answer]
    again: list[Answer]
    accepted: Accepted
    accepted_again: Accepted


def ask_twice(model: Path, draft_tokens: int, apart: bool = False, **own: Any) -> Drafted:
    own |= {"speculative_config": {"method": "mtp", "num_speculative_tokens": draft_tokens}}
    # The steps are so short that the longer prompts take several, beside the others' drafts.
    with DRIVER.engine(model, prefix_caching=True, chunk=256, apart=apart, own=own) as engine:
        answers = engine.ask(PROMPTS, NEW_TOKENS)
        accepted = Accepted.read(engine.llm)
        again = engine.ask(PROMPTS, NEW_TOKENS)
        return Drafted(answers, again, accepted, Accepted.read(engine.llm).since(accepted))


def assert_answers(found: Drafted, model: Path) -> None:
    truth = oracle.load(model)
    for prompt, answer, again, cached in zip(PROMPTS, found.answers, found.again, CACHED, strict=True):
        assert_true(answer, prompt, truth)
        assert again.tokens == answer.tokens
        assert (answer.cached, again.cached) == (0, cached)


def test_every_draft_is_right(tmp_path: Path):
    """Each draft token attends to itself alone; one that does not see its own key is wrong from the second place on.

    In processes of its own, as a server has them.
    """
    model = write_own(tmp_path / "m3")
    found = ask_twice(model, 3, apart=True)
    for accepted in (found.accepted, found.accepted_again):
        print(accepted)
        assert accepted.places == [accepted.drafts] * 3
    assert_answers(found, model)


def test_every_draft_is_right_with_fp8_caches(tmp_path: Path):
    """The answers are those without drafts: verified in rows of four tokens, or one at a time."""
    fp8 = {"kv_cache_dtype": "fp8", "attention_config": {"indexer_kv_dtype": "fp8"}}
    model = write_own(tmp_path / "m3")
    found = ask_twice(model, 3, **fp8)
    for accepted in (found.accepted, found.accepted_again):
        assert accepted.places == [accepted.drafts] * 3
    with DRIVER.engine(model, own=fp8) as engine:
        plain = engine.ask(PROMPTS, NEW_TOKENS)
    apart = [abs(a - b) for x, y in zip(found.answers, plain, strict=True)
             for a, b in zip(x.logprobs, y.logprobs, strict=True)]  # fmt: skip
    print(f"{max(apart):.1e}")
    assert [answer.tokens for answer in found.answers] == [answer.tokens for answer in plain]
    assert max(apart) < 1e-2


def test_drafts_are_right_where_the_caches_are(tmp_path: Path):
    """The module is the target's one loud layer, so it is right if its caches hold what the target's do.

    Not always: it never sees the first token, its blocks begin one token later, and vLLM gives it a wrong token at the
    end of each chunk of a prompt. 0.90, 0.88 and 0.83 of the drafts were accepted at the three places, given those
    before, and a few less or more as the prompts were cut. When the module's layer did not write its prompts to its
    caches, or its experts' halves lay in the wrong order, it was 0.02 at the first place and none later.
    """
    model = write_clone(tmp_path / "m3")
    found = ask_twice(model, 3)
    for accepted in (found.accepted, found.accepted_again):
        print(accepted, accepted.rates)
        assert min(accepted.rates) > 0.6
    assert_answers(found, model)


def test_no_draft_is_right(tmp_path: Path):
    model = write_rejected(tmp_path / "m3")
    found = ask_twice(model, 1)
    for accepted in (found.accepted, found.accepted_again):
        assert accepted.places == [0]
        # Every token of an answer but the first and the last is followed by a draft.
        assert accepted.tokens >= len(PROMPTS) * (NEW_TOKENS - 2)
    assert_answers(found, model)


@pytest.fixture
def drafting(tmp_path: Path) -> Callable[..., Any]:
    """An engine on the tiny checkpoint with a module, whose drafts are right as often as the answer is a successor."""
    model = write_tiny_checkpoint(tmp_path / "m3", shape=TinyShape(mtp_modules=1))

    def start(**options: Any) -> Any:
        own = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 7}}
        return DRIVER.engine(model, own=own, **options)

    return start


def test_seven_drafts_and_a_cache_too_small(drafting: Callable[..., Any], tiny: Path, truth: Any):
    """Drafts accepted and rejected at any place, of requests that are thrown out and begin anew."""
    prompts = MANY[:4]
    with drafting(prefix_caching=True, chunk=512, context=1024, pages=18, preempting=True) as engine:
        answers = engine.ask(prompts, 60)
        accepted = Accepted.read(engine.llm)
        assert engine.preemptions() > 0
    print(accepted, accepted.rates)
    # Some of the first three are accepted and some are not; of seven in a row there may be few.
    assert all(0.3 < rate < 1 for rate in accepted.rates[:3])
    assert accepted.tokens <= 7 * accepted.drafts
    for prompt, answer in zip(prompts, answers, strict=True):
        assert_true(answer, prompt, truth)
