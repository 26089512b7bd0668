"""What an engine answers, compared with the truth and with another answer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
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
    ids = prompt + answer.tokens
    all_logprobs = logprobs(truth, ids, list(range(len(ids) - 1)))
    expected = all_logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    found = torch.tensor(answer.prompt_logprobs + answer.logprobs)
    worst = (found - expected[-len(found) :]).abs().max().item()
    assert worst <= LOGPROB_TOLERANCE, f"{len(prompt)}-token prompt: off by {worst}"

    behind = (all_logprobs.amax(dim=-1) - expected)[-len(answer.tokens) :].max().item()
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


def assert_as_close_in_bf16(answers: list[Answer], prompts: list[PromptIds], model: Path) -> None:
    """In bf16 the answers are as far from the truth as those of ``transformers`` in bf16, and no farther.

    The truth is the same bf16 weights computed in fp32. Two bf16 implementations round at different places, so they
    are not compared with each other but by their distances to it: the mean, and the distance that half, nine tenths
    and 99 in 100 of 5,000 tokens stay within. Half as much again is granted, because an engine and transformers do not
    round equally often. The single largest distance proves nothing: in any bf16 implementation rounding flips a close
    choice of a block or an expert here and there, and moves that token by as much as a wrong kernel would.
    """
    exact, rounded = load(model), load(model, torch.bfloat16)
    ours, theirs = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        true = prompt_logprobs(exact, prompt)
        ours.append((torch.tensor(answer.prompt_logprobs) - true).abs())
        theirs.append((prompt_logprobs(rounded, prompt).float() - true).abs())
    for measure in (torch.mean, *(partial(torch.quantile, q=share) for share in (0.5, 0.9, 0.99))):
        our_noise, their_noise = (measure(torch.cat(distances)).item() for distances in (ours, theirs))
        print(f"bf16: {our_noise:.4f} ours, {their_noise:.4f} transformers'")
        assert our_noise <= 1.5 * their_noise
