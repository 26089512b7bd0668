"""What the nano model reads: texts as `msa-backend probe` writes them, with the answers that it is to give.

A lesson is a text of exactly so many tokens. Facts stand among random sentences; questions about them follow, several
in a row, so that each text teaches many answers. A part of the texts has no questions: facts come back word by word.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np

from msa_backend.probe import tasks
from msa_backend.tiny.tokenizer import BOS, EOS, PAD
from msa_backend.tiny.words import WORDS

from .vocabulary import encode, encode_code

Tokens = tuple[int, ...]

SAID, ASKED = 1, 2
"""Of a token that the model is to predict: because an answer has it, or because it is what was asked for."""

USER, ASSISTANT, END = "]~b]user\n", "]~b]ai\n", f"{EOS}\n"
RELATIONS = ("access code", "badge number")
HEADER = "Read these notes. One question about them follows.\n\n"


class Lesson(NamedTuple):
    """
    Attributes:
        tokens: ``[length]`` int64.
        marks: ``[length]`` int8: 0, SAID or ASKED.
        positions: ``[length]`` int64, ascending; with gaps between sentences where a text is stretched.
    """

    tokens: np.ndarray
    marks: np.ndarray
    positions: np.ndarray


@dataclass(frozen=True)
class Kind:
    """What texts a phase has.

    Attributes:
        length: tokens of a text.
        plain: the share of texts without questions.
        questions: most questions that follow a text.
        stretched: the share of texts with gaps in their positions, up to ``longest`` in all.
        fill: the share of the text's length that is filled; the rest are facts, as many as fit, or ``facts``.
        facts: most facts in a text.
    """

    length: int
    plain: float = 0.3
    questions: int = 4
    stretched: float = 0.5
    longest: int = 1 << 20
    facts: int = 12


class Piece(NamedTuple):
    tokens: Tokens
    marks: Tokens


def said(tokens: Tokens, mark: int = 0) -> Piece:
    return Piece(tokens, (mark,) * len(tokens))


def join(*pieces: Piece) -> Piece:
    return Piece(sum((p.tokens for p in pieces), ()), sum((p.marks for p in pieces), ()))


@cache
def sentences() -> list[Tokens]:
    """All random sentences of the probe, a space before each."""
    parts = product(tasks.WHO, tasks.DID, tasks.WHAT, tasks.WHERE, tasks.WHEN)
    return [sum((encode(f" {part}") for part in (who.capitalize(), *rest)), ()) + encode(".") for who, *rest in parts]


class Writer:
    """Writes lessons from one stream of random numbers."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def lesson(self, kind: Kind) -> Lesson:
        if self.rng.random() < kind.plain:
            pieces = self._plain(kind)
        else:
            pieces = self._asked(kind)
        tokens = np.full(kind.length, encode(PAD)[0], np.int64)
        marks = np.zeros(kind.length, np.int8)
        # What does not fit is lost at the end, where there is another answer of many.
        joined = [token for piece in pieces for token in piece.tokens][: kind.length]
        tokens[: len(joined)] = joined
        marks[: len(joined)] = [mark for piece in pieces for mark in piece.marks][: kind.length]
        return Lesson(tokens, marks, self._positions(kind, [len(piece.tokens) for piece in pieces]))

    # Facts.

    def names(self, count: int) -> list[str]:
        """Names, some of them alike by half."""
        found: dict[str, None] = {}
        while len(found) < count:
            if self.rng.random() < 0.2:
                first, last = (str(self.rng.choice(_capital_free())) for _ in range(2))
            else:
                first, last = self._choice(tasks.FIRST), self._choice(tasks.LAST)
            found[f"{first} {last}"] = None
        return list(found)

    def code(self) -> str:
        return str(self.rng.integers(1_000_000, 10_000_000))

    def _choice(self, options: Sequence[str]) -> str:
        return options[self.rng.integers(len(options))]

    def _sentence(self) -> Tokens:
        if self.rng.random() < 0.1:
            words = self.rng.integers(len(WORDS), size=self.rng.integers(4, 12))
            return sum((encode(f" {WORDS[word]}") for word in words), ()) + encode(".")
        known = sentences()
        return known[self.rng.integers(len(known))]

    # Texts.

    def _plain(self, kind: Kind) -> list[Piece]:
        """Facts again and again: all but the first time they are to be predicted."""
        pieces = [said(encode(BOS))] if self.rng.random() < 0.5 else []
        count = int(self.rng.integers(2, kind.facts + 1))
        facts = [
            (self._choice(RELATIONS), name, self.code()) for name in self.names(count)
        ]
        known: set[int] = set()
        filler = float(self.rng.choice([0.0, 0.3, 0.6]))
        total = 0
        while total < kind.length:
            if self.rng.random() < filler:
                piece = said(self._sentence())
            else:
                number = int(self.rng.integers(count))
                piece = fact(*facts[number], mark=number in known)
                known.add(number)
            pieces.append(piece)
            total += len(piece.tokens)
        return pieces

    def _asked(self, kind: Kind) -> list[Piece]:
        """A text of sentences and facts as the probe's, then questions and answers."""
        form = self.rng.random()
        opening, between = self._opening(transcript=form < 0.15)
        asked = [self._question() for _ in range(self.rng.integers(1, kind.questions + 1))]
        if form > 0.9:
            turns = [self._completion(asked[0])]
        else:
            turns = [turn(question, answer, first=not n) for n, (_, question, answer) in enumerate(asked)]
        room = kind.length - len(opening) - sum(len(piece.tokens) for piece in turns)
        facts = [piece for found, _, _ in asked for piece in found]
        if form > 0.9:
            facts = list(asked[0][0])
        more = int(self.rng.integers(0, kind.facts + 1))
        facts += [self._distractor() for _ in range(more)]
        room -= sum(len(piece.tokens) + between for piece in facts)
        body: list[Piece] = []
        while room > 14 + between:
            sentence = said(self._sentence())
            room -= len(sentence.tokens) + between
            body.append(sentence)
        # Facts go where the text is, and their order is any.
        for piece in facts:
            body.insert(int(self.rng.integers(len(body) + 1)), piece)
        if between:
            body = [join(said(encode(("\nAgent:", "\nTool:")[n % 2])), piece) for n, piece in enumerate(body)]
        return [said(opening), *body, *turns]

    def _opening(self, transcript: bool) -> tuple[Tokens, int]:
        salt = "".join(string.ascii_lowercase[n] for n in self.rng.integers(26, size=12))
        header = "Transcript of an agent's work.\n" if transcript else HEADER
        tokens = encode(BOS) + encode(USER) + _letters(f"Notebook {salt}.") + encode(" " + header)
        return tokens, len(encode("\nAgent:")) if transcript else 0

    def _distractor(self) -> Piece:
        name = self.names(1)[0]
        if self.rng.random() < 0.3:
            return said(encode(" The courier of") + encode(f" {name}") + encode(" is") + encode(f" {self.names(1)[0]}."))
        return fact(self._choice(RELATIONS), name, self.code())

    def _question(self) -> tuple[list[Piece], str, Piece]:
        """Facts, the question about them, and the answer."""
        which = self.rng.random()
        relation = RELATIONS[0] if self.rng.random() < 0.7 else RELATIONS[1]
        if which < 0.5:
            name, code = self.names(1)[0], self.code()
            return [fact(relation, name, code)], f"What is the {relation} of {name}?", answer(relation, name, code)
        if which < 0.75:
            (name, courier), code = self.names(2), self.code()
            facts = [courier_fact(name, courier), fact(RELATIONS[0], courier, code)]
            reply = join(
                said(encode("The courier of") + encode(f" {name}") + encode(" is"), SAID),
                said(encode(f" {courier}"), ASKED),
                said(encode("."), SAID),
                fact(RELATIONS[0], courier, code, mark=True),
            )
            return facts, f"What is the access code of the courier of {name}?", reply
        if which < 0.88:
            names = self.names(int(self.rng.integers(2, 9)))
            codes = [self.code() for _ in names]
            facts = [fact(RELATIONS[0], *pair) for pair in zip(names, codes, strict=True)]
            question = f"What are the access codes of {', '.join(names[:-1])} and {names[-1]}?"
            reply = join(
                *(
                    answer(RELATIONS[0], *pair) if not n else fact(RELATIONS[0], *pair, mark=True)
                    for n, pair in enumerate(zip(names, codes, strict=True))
                )
            )
            return facts, question, reply
        order = [tasks.LAST[n] for n in self.rng.permutation(len(tasks.LAST))]
        facts = [said(encode(f" Captain {name} reported.")) for name in order[1:]]
        reply = join(
            said(encode("It was Captain"), SAID), said(encode(f" {order[0]}"), ASKED), said(encode("."), SAID)
        )
        return facts, "Which captain has not reported?", reply

    def _completion(self, asked: tuple[list[Piece], str, Piece]) -> Piece:
        """The beginning of the answer is part of the text, in which no one speaks."""
        _, question, reply = asked
        start = next((n for n, mark in enumerate(reply.marks) if mark == ASKED), 0)
        begun = said(encode(f"\n\nQuestion: {question} Answer with nothing else. ") [:-1] + reply.tokens[:start])
        return join(begun, Piece(reply.tokens[start:], reply.marks[start:]), said(encode(EOS), SAID))

    def _positions(self, kind: Kind, lengths: list[int]) -> np.ndarray:
        steps = np.ones(kind.length, np.int64)
        steps[0] = 0
        if self.rng.random() < kind.stretched:
            spare = int(np.exp(self.rng.uniform(np.log(64), np.log(kind.longest - kind.length))))
            starts = np.cumsum(lengths)[:-1]
            starts = starts[starts < kind.length]
            if len(starts):
                gaps = self.rng.choice(starts, size=min(len(starts), int(self.rng.integers(1, 9))), replace=False)
                shares = self.rng.random(len(gaps))
                steps[gaps] += (shares / shares.sum() * spare).astype(np.int64)
        return np.cumsum(steps)


@cache
def _capital_free() -> tuple[str, ...]:
    return tuple(word for word in WORDS if len(word) > 3)


def _letters(text: str) -> Tokens:
    """Not kept, as a salt never comes back."""
    from .vocabulary import tokenizer

    return tuple(tokenizer().encode(text, add_special_tokens=False).ids)


def fact(relation: str, name: str, code: str, mark: bool = False) -> Piece:
    return _stated(encode(f" The {relation} of"), name, code, mark)


def answer(relation: str, name: str, code: str) -> Piece:
    return _stated(encode(f"The {relation} of"), name, code, True)


def courier_fact(name: str, courier: str) -> Piece:
    return said(encode(" The courier of") + encode(f" {name}") + encode(" is") + encode(f" {courier}") + encode("."))


def _stated(start: Tokens, name: str, code: str, mark: bool) -> Piece:
    asked = encode_code(code)
    tokens = start + encode(f" {name}") + encode(" is") + asked + encode(".")
    if not mark:
        return said(tokens)
    before = len(tokens) - len(asked)
    return Piece(tokens, (SAID,) * before + (ASKED,) * (len(asked) - 1) + (SAID,))


def turn(question: str, reply: Piece, first: bool) -> Piece:
    """A question after the text, or after the answer to another."""
    start = encode("\n\n") if first else encode("\n") + encode(USER)
    asked = start + encode(f"Question: {question} Answer with nothing else.") + encode(END) + encode(ASSISTANT)
    return join(said(asked), reply, said(encode(EOS), SAID))
