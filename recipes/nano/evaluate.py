"""What a run can do, on the probe's own texts, and that it cannot when selection is broken on purpose.

An answer is right if each of its tokens is the most likely one after those before: greedy decoding says the same.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from msa_backend.probe.tasks import TASKS, Place, Task
from msa_backend.tiny.tokenizer import BOS, EOS

from .model import Nano, Reading
from .text import ASSISTANT, END, USER, Piece, answer, courier_said, fact, join, missing_captain
from .vocabulary import tokenizer

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
WORDS_PER_TOKEN = 0.9


def _random_blocks(scores: Tensor) -> Tensor:
    generator = torch.Generator(scores.device).manual_seed(0)
    return torch.rand(scores.shape, generator=generator, device=scores.device)


@dataclass(frozen=True)
class Manner:
    """How blocks are chosen.

    Attributes:
        fails: the task that cannot be done so; None if all can.
    """

    topk: int = 16
    damage: Callable[[Tensor], Tensor] | None = None
    fails: str | None = None


MANNERS = {
    "as trained": Manner(),
    "random blocks": Manner(damage=_random_blocks, fails="needle"),
    "scores one block off": Manner(damage=lambda scores: scores.roll(1, -1), fails="needle"),
    "top-k 4": Manner(topk=4, fails="roll-call"),
}
WANTED = {"needle": 0.99, "two-hop": 0.95}
BROKEN = 0.5
"""A task scores less than this where it must fail."""


def reply(name: str, task: Task) -> Piece:
    """The answer to a task of the probe, in the words in which the model was taught to give it."""
    question = task.text.rpartition("Question: ")[2]
    if name == "roll-call":
        return missing_captain(task.codes[0])
    if name == "two-hop":
        asked = _found(r"courier of ([\w ]+)\?", question)
        courier = _found(rf"The courier of {asked} is ([\w ]+)\.", task.text)
        return join(courier_said(asked, courier), fact("access code", courier, task.codes[0], mark=True))
    names = re.split(", | and ", _found(r"access codes? of ([\w, ]+)\?", question))
    parts = [
        (fact if n else answer)("access code", asked, code, mark=True)
        for n, (asked, code) in enumerate(zip(names, task.codes, strict=True))
    ]
    return join(*parts)


def _found(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    assert found is not None, f"{pattern} is not in the text"
    return found[1]


@torch.no_grad()
def is_right(model: Nano, name: str, task: Task, manner: Manner) -> bool:
    device = model.lm_head.weight.device
    prompt = tokenizer().encode(f"{BOS}{USER}{task.text}{END}{ASSISTANT}", add_special_tokens=False).ids
    wanted = [*reply(name, task).tokens, tokenizer().token_to_id(EOS)]
    tokens = torch.tensor([[*prompt, *wanted]], device=device)
    hidden = model(tokens, Reading(topk=manner.topk, damage=manner.damage))
    logits = model.lm_head(hidden[0, len(prompt) - 1 : -1])
    return bool((logits.argmax(-1) == tokens[0, len(prompt) :]).all())


def evaluate(
    model: Nano, lengths: list[int], repeats: int, names: tuple[str, ...] = tuple(TASKS)
) -> Iterator[dict[str, Any]]:
    """For each length, manner and task the share of right answers, over all depths."""
    for length in lengths:
        for how, manner in MANNERS.items():
            for name in names:
                right = []
                for depth in DEPTHS:
                    for repeat in range(repeats):
                        rng = random.Random(f"{name} {length} {depth} {repeat}")
                        task = TASKS[name](rng, Place(int(length * WORDS_PER_TOKEN), depth))
                        right.append(is_right(model, name, task, manner))
                yield {"length": length, "manner": how, "task": name, "score": sum(right) / len(right)}


def verdicts(found: list[dict[str, Any]]) -> Iterator[str]:
    """A sentence for each result that is not what it must be."""
    for result in found:
        fails = MANNERS[result["manner"]].fails
        where = f"{result['task']} at {result['length']} tokens, {result['manner']}: {100 * result['score']:.1f} %"
        if fails is None and result["score"] < WANTED.get(result["task"], 0.0):
            yield f"{where}, less than {100 * WANTED[result['task']]:.0f}"
        if fails == result["task"] and result["score"] >= BROKEN:
            yield f"{where}, and so must fail"
