"""What is asked: facts in a long text, and a question that only they answer.

The text around them is made of random sentences without digits, so that a code of digits stands nowhere else. A salt in
front makes each prompt new to a prefix cache.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

FIRST = ("Ada", "Boris", "Carla", "Dmitri", "Elena", "Farid", "Greta", "Hassan", "Ingrid", "Jorge", "Keiko", "Lars")
LAST = ("Abbott", "Brandt", "Castillo", "Dufour", "Eriksen", "Fontaine", "Grigoryan", "Holloway", "Ibarra", "Jansen")
WHO = (
    "the gardener",
    "a night porter",
    "the older sister",
    "a passing sailor",
    "the clerk",
    "our neighbour",
    "a tailor",
)
DID = ("carried", "forgot", "repaired", "painted", "sold", "described", "hid", "borrowed", "admired", "measured")
WHAT = (
    "a brass lantern",
    "the blue ladder",
    "an old map",
    "two wicker chairs",
    "the bell",
    "a heavy coat",
    "some rope",
)
WHERE = ("by the harbour", "behind the mill", "in the attic", "near the bridge", "at the market", "under the stairs")
WHEN = ("before dawn", "in late autumn", "after the storm", "on a quiet morning", "during the feast", "that winter")
ROLL_CALL = f"The captains are {', '.join(LAST[:-1])} and {LAST[-1]}. Which one has not reported?"


@dataclass(frozen=True)
class Task:
    """
    Attributes:
        text: the whole prompt.
        codes: all of which a right answer holds.
    """

    text: str
    codes: tuple[str, ...]

    def score(self, answer: str) -> float:
        """The share of the codes that are in it, however their digits are set apart."""
        digits = re.sub(r"(?<=\d)[\s,.'_-](?=\d)", "", answer)
        return sum(code in digits for code in self.codes) / len(self.codes)


@dataclass(frozen=True)
class Place:
    """Where in the text: ``words`` in all, at ``depth`` from 0, the beginning, to 1, the end."""

    words: int
    depth: float


def needle(rng: random.Random, place: Place) -> Task:
    """One fact."""
    name, code = _names(rng, 1)[0], _code(rng)
    fact = f"The access code of {name} is {code}."
    return _task(rng, place.words, {place.depth: fact}, f"What is the access code of {name}?", code)


def two_hop(rng: random.Random, place: Place) -> Task:
    """Two facts, the second half a text after the first or before it, of which either alone says nothing."""
    name, courier, other = _names(rng, 3)
    code = _code(rng)
    facts = {
        place.depth: f"The courier of {name} is {courier}.",
        (place.depth + 0.5) % 1: f"The access code of {courier} is {code}.",
        (place.depth + 0.25) % 1: f"The access code of {other} is {_code(rng)}.",
    }
    return _task(rng, place.words, facts, f"What is the access code of the courier of {name}?", code)


def many(rng: random.Random, place: Place) -> Task:
    """Eight facts, an eighth of the text apart, from ``depth`` on and round the end; all are asked for."""
    names, codes = _names(rng, 8), [_code(rng) for _ in range(8)]
    facts = {
        (place.depth + i / 8) % 1: f"The access code of {name} is {code}."
        for i, (name, code) in enumerate(zip(names, codes, strict=True))
    }
    question = f"What are the access codes of {', '.join(names[:-1])} and {names[-1]}?"
    return _task(rng, place.words, facts, question, *codes)


def transcript(rng: random.Random, place: Place) -> Task:
    """A fact among the steps of an agent, whose newest steps are about something else."""
    name, code, newer = _names(rng, 1)[0], _code(rng), _code(rng)
    sentences = _sentences(rng, place.words, beside=2)  # who speaks, and a new line
    steps = [f"{'Tool' if number % 2 else 'Agent'}: {sentence}" for number, sentence in enumerate(sentences)]
    at = min(int(place.depth * len(steps)), max(len(steps) - 4, 0))
    steps.insert(at, f"Tool: lookup done. The access code of {name} is {code}.")
    steps.append(f"Tool: lookup done. The access code of the archive is {newer}.")
    text = f"{_salt(rng)}Transcript of an agent's work.\n\n" + "\n".join(steps)
    return Task(f"{text}\n\n{_question(f'What is the access code of {name}?')}", (code,))


def roll_call(rng: random.Random, place: Place) -> Task:
    """Nine facts, a ninth of the text apart, which only all together answer: who of ten is in none of them."""
    missing, *present = rng.sample(LAST, len(LAST))
    facts = {(place.depth + i / len(present)) % 1: f"Captain {name} reported." for i, name in enumerate(present)}
    return _task(rng, place.words, facts, ROLL_CALL, missing)


TASKS: dict[str, Callable[[random.Random, Place], Task]] = {
    "needle": needle,
    "two-hop": two_hop,
    "many": many,
    "transcript": transcript,
    "roll-call": roll_call,
}


def at_boundary(
    rng: random.Random, tokenize: Callable[[str], list[int]], num_tokens: int, offset: int, block: int = 128
) -> tuple[list[int], str]:
    """Tokens of a prompt whose fact begins ``offset`` tokens after a block does, in its middle, and the code.

    Args:
        tokenize: the server's, so that tokens are its own.
    """
    name, code = _names(rng, 1)[0], _code(rng)
    filler = tokenize(_salt(rng) + " ".join(_sentences(rng, 2 * num_tokens)))
    fact = tokenize(f" The access code of {name} is {code}.")
    question = tokenize(f"\n\n{_question(f'What is the access code of {name}?')} The access code of {name} is")
    before = num_tokens // 2 // block * block + offset
    after = max(0, num_tokens - before - len(fact) - len(question))
    if len(filler) < before + after:
        raise ValueError(f"{len(filler)} tokens of filler are fewer than {before + after}")
    return [*filler[:before], *fact, *filler[before : before + after], *question], code


def _task(rng: random.Random, words: int, facts: dict[float, str], question: str, *codes: str) -> Task:
    sentences = _sentences(rng, words)
    # From the end, so that earlier places stay where they are.
    for depth, fact in sorted(facts.items(), reverse=True):
        sentences.insert(round(depth * len(sentences)), fact)
    text = f"{_salt(rng)}Read these notes. One question about them follows.\n\n" + " ".join(sentences)
    return Task(f"{text}\n\n{_question(question)}", codes)


def _question(question: str) -> str:
    return f"Question: {question} Answer with nothing else."


def _sentences(rng: random.Random, words: int, beside: int = 0) -> list[str]:
    found, count = [], 0
    while count < words:
        who, did, what, where, when = (rng.choice(part) for part in (WHO, DID, WHAT, WHERE, WHEN))
        sentence = f"{who.capitalize()} {did} {what} {where} {when}."
        found.append(sentence)
        count += len(sentence.split()) + beside
    return found


def _names(rng: random.Random, count: int) -> Sequence[str]:
    return rng.sample([f"{first} {last}" for first in FIRST for last in LAST], count)


def _code(rng: random.Random) -> str:
    return str(rng.randrange(1_000_000, 10_000_000))


def _salt(rng: random.Random) -> str:
    return f"Notebook {''.join(rng.choices('abcdefghijklmnopqrstuvwxyz', k=12))}. "
