"""An answer counts if greedy decoding would give all of it."""

from __future__ import annotations

from random import Random

import pytest
import torch
from nano.evaluate import DEPTHS, MANNERS, Manner, evaluate, is_right, reply
from nano.model import Reading
from nano.vocabulary import tokenizer
from torch import Tensor

from msa_backend.probe.tasks import TASKS, Place


class Foretold:
    """A model that knows each next token but one.

    Args:
        wrong: that one, counted from the end of the text; None: it knows all.
    """

    def __init__(self, wrong: int | None = None) -> None:
        self.wrong = wrong
        self.readings: list[Reading] = []
        self.lm_head = self.Head()

    class Head:
        weight = torch.zeros(1)

        def __call__(self, hidden: Tensor) -> Tensor:
            return hidden

    def __call__(self, tokens: Tensor, reading: Reading) -> Tensor:
        self.readings.append(reading)
        following = tokens.roll(-1, 1)
        if self.wrong is not None:
            following[0, -1 - self.wrong] += 1
        return torch.nn.functional.one_hot(following, tokenizer().get_vocab_size() + 1).float()


@pytest.mark.parametrize("name", [*TASKS])
def test_every_token_of_the_answer_counts(name: str):
    task = TASKS[name](Random(0), Place(200, 0.5))
    length = len(reply(name, task).tokens) + 1  # and the end
    assert is_right(Foretold(), name, task, Manner())
    for wrong in (1, length // 2, length):
        assert not is_right(Foretold(wrong), name, task, Manner())
    assert is_right(Foretold(length + 1), name, task, Manner()), "the prompt is given"


def test_all_is_asked_in_all_manners():
    model = Foretold()
    found = list(evaluate(model, [300], repeats=2, names=("needle", "roll-call")))
    assert [(result["manner"], result["task"]) for result in found] == [
        (manner, task) for manner in MANNERS for task in ("needle", "roll-call")
    ]
    assert all(result["score"] == 1.0 for result in found)
    assert len(model.readings) == len(found) * 2 * len(DEPTHS)
    seen = [(reading.topk, reading.damage) for reading in model.readings[:: 4 * len(DEPTHS)]]
    assert seen == [(manner.topk, manner.damage) for manner in MANNERS.values()]


def test_damage_damages():
    scores = torch.rand(1, 2, 8, 40, generator=torch.Generator().manual_seed(1))
    for manner in MANNERS.values():
        if manner.damage is not None:
            best, other = scores.argmax(-1), manner.damage(scores).argmax(-1)
            assert (best == other).float().mean() < 0.2
    assert MANNERS["as trained"] == Manner(topk=16)
