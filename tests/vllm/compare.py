"""Compare answers with the truth and with each other."""

from __future__ import annotations

from typing import Any

from ..oracle import LOGPROB_TOLERANCE, logprobs, prompt_logprobs
from .engines import Answer, PromptIds


def assert_true(answer: Answer, prompt: PromptIds, truth: Any) -> None:
    """Every log-probability is the oracle's, and every token its most probable one.

    The oracle reads the prompt with the engine's answer behind it, in one pass. A token that is not its first
    choice is allowed only as a tie: two tokens closer to each other than the tolerance, which rounding may swap.
    """
    ids = prompt + answer.tokens
    expected = prompt_logprobs(truth, ids)
    found = answer.prompt_logprobs + answer.logprobs
    compared = expected[-len(found) :]
    worst = max(abs(said - true) for said, true in zip(found, compared.tolist(), strict=True))
    assert worst <= LOGPROB_TOLERANCE, f"{len(prompt)}-token prompt: off by {worst}"

    after = list(range(len(prompt) - 1, len(ids) - 1))
    best = logprobs(truth, ids, after).amax(dim=-1)
    behind = (best - expected[-len(answer.tokens) :]).max().item()
    assert behind <= LOGPROB_TOLERANCE, f"{len(prompt)}-token prompt: a token lies {behind} behind the most probable"


def assert_same(found: Answer, expected: Answer) -> None:
    """The same tokens with the same log-probabilities.

    Where two tokens are closer than the tolerance the engine may take either, as batches of other shapes round
    otherwise. Both then had almost the same log-probability, and what follows is no longer comparable.
    """
    for at, (token, other) in enumerate(zip(found.tokens, expected.tokens, strict=True)):
        gap = abs(found.logprobs[at] - expected.logprobs[at])
        assert gap <= LOGPROB_TOLERANCE, f"token {at}: {token} and {other} differ by {gap}"
        if token != other:
            return
