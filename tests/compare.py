"""What an engine answers, compared with the truth and with another answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from .oracle import LOGPROB_TOLERANCE, load, logprobs, prompt_logprobs

PromptIds = list[int]


@dataclass(frozen=True)
class Answer:
    """What an engine said to one prompt.

    Attributes:
        tokens: the greedy continuation.
        logprobs: the log-probability of each of them.
        prompt_logprobs: of each prompt token but the first; empty unless asked for.
        cached: prompt tokens that were taken from the prefix cache.
    """

    tokens: list[int]
    logprobs: list[float]
    prompt_logprobs: list[float]
    cached: int


def assert_true(answer: Answer, prompt: PromptIds, truth: Any) -> None:
    """Every log-probability is the oracle's, and every token its most probable one.

    The oracle reads the prompt with the engine's answer behind it, in one pass. A token that is not its first
    choice is allowed only as a tie: two tokens closer to each other than the tolerance, which rounding may swap.
    """
    expected, best = _read(truth, (*prompt, *answer.tokens))
    found = torch.tensor(answer.prompt_logprobs + answer.logprobs)
    worst = (found - expected[-len(found) :]).abs().max().item()
    assert worst <= LOGPROB_TOLERANCE, f"{len(prompt)}-token prompt: off by {worst}"

    behind = (best - expected)[-len(answer.tokens) :].max().item()
    assert behind <= LOGPROB_TOLERANCE, f"{len(prompt)}-token prompt: a token lies {behind} behind the most probable"


# Most answers are the same, however the engine that gave them was started.
@cache
def _read(truth: Any, ids: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probability of each token but the first, and of the most probable one in its place."""
    found = logprobs(truth, list(ids), list(range(len(ids) - 1)))
    return found.gather(1, torch.tensor(ids[1:])[:, None])[:, 0], found.amax(dim=-1)


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


def assert_as_close_in_bf16(answers: Sequence[Answer], prompts: Sequence[PromptIds], model: Path) -> None:
    """In bf16 the answers are as far from the truth as those of ``transformers`` in bf16, and no farther.

    The truth is the same bf16 weights computed in fp32. Two bf16 implementations round at different places, so they
    are not compared with each other but by their distances to it: the mean, and the distance that half, nine tenths
    and 99 in 100 of the tokens stay within. Half as much again is granted, because an engine and transformers do not
    round equally often. The single largest distance proves nothing: in any bf16 implementation rounding flips a close
    choice of a block or an expert here and there, and moves that token by as much as a wrong kernel would. A few
    thousand tokens tell.
    """
    exact, rounded = load(model), load(model, torch.bfloat16)
    ours, theirs = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids, found = prompt + answer.tokens, torch.tensor(answer.prompt_logprobs + answer.logprobs)
        true, other = (prompt_logprobs(reader, ids).float()[-len(found) :] for reader in (exact, rounded))
        ours.append((found - true).abs())
        theirs.append((other - true).abs())
    for measure in (torch.mean, *(partial(torch.quantile, q=share) for share in (0.5, 0.9, 0.99))):
        our_noise, their_noise = (measure(torch.cat(distances)).item() for distances in (ours, theirs))
        noise = f"bf16: {our_noise:.4f} ours, {their_noise:.4f} transformers'"
        print(noise)
        assert our_noise <= 1.5 * their_noise, noise
