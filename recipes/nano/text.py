"""What the nano model reads: texts as `msa-backend probe` writes them, with the answers that it is to give.

A lesson is a text of exactly so many tokens. Facts stand among random sentences; questions about them follow, several
in a row, so that each text teaches many answers. A part of the texts has no questions: facts come back word by word.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from functools import cache
from itertools import chain, product
from math import exp, log
from random import Random
from typing import NamedTuple

import numpy as np

from msa_backend.probe import tasks
from msa_backend.tiny.tokenizer import BOS, EOS, PAD
from msa_backend.tiny.words import WORDS

from .vocabulary import encode, encode_code, tokenizer

Tokens = tuple[int, ...]

SAID, ASKED = 1, 2
"""Of a token that the model is to predict: because an answer has it, or because it is what was asked for."""

USER, ASSISTANT, END = "]~b]user\n", "]~b]ai\n", f"{EOS}\n"
CODE, BADGE = "access code", "badge number"
HEADER = " Read these notes. One question about them follows.\n\n"
TRANSCRIPT = " Transcript of an agent's work.\n"
SPEAKERS = ("\nAgent:", "\nTool:")
NAMES = tuple(f"{first} {last}" for first, last in product(tasks.FIRST, tasks.LAST))
NAME_WORDS = tuple(word for word in WORDS if len(word) > 3)
LONGEST_SENTENCE = 14


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
        facts: most facts in a text, besides those that are asked for.
        stretched: the share of texts with gaps in their positions.
        longest: what positions stay below.
    """

    length: int
    plain: float = 0.3
    questions: int = 4
    facts: int = 12
    stretched: float = 0.5
    longest: int = 1 << 20


class Piece(NamedTuple):
    """Tokens and their marks."""

    tokens: Tokens
    marks: Tokens


def said(tokens: Tokens, mark: int = 0) -> Piece:
    return Piece(tokens, (mark,) * len(tokens))


def join(*pieces: Piece) -> Piece:
    return Piece(*(tuple(chain.from_iterable(parts)) for parts in zip(*pieces, strict=True)))


class Asked(NamedTuple):
    """A question, the facts that it is about, and its answer."""

    facts: list[Piece]
    question: str
    reply: Piece


class Writer:
    """Writes lessons from one stream of random numbers."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.named: set[str] = set()

    def lesson(self, kind: Kind) -> Lesson:
        self.named = set()
        plain = self.rng.random() < kind.plain
        pieces = self._plain(kind) if plain else self._questioned(kind)
        # What does not fit is lost at the end, where there is another answer of many.
        joined = Piece(*(part[: kind.length] for part in join(*pieces)))
        tokens: np.ndarray = np.full(kind.length, encode(PAD)[0], np.int64)
        marks: np.ndarray = np.zeros(kind.length, np.int8)
        tokens[: len(joined.tokens)] = joined.tokens
        marks[: len(joined.marks)] = joined.marks
        return Lesson(tokens, marks, self._positions(kind, [len(piece.tokens) for piece in pieces]))

    def names(self, count: int) -> list[str]:
        """Names that the text has not had: two facts never contradict each other."""
        found: list[str] = []
        while len(found) < count:
            if self.rng.random() < 0.2 or len(self.named) > len(NAMES) * 3 // 4:
                name = f"{self.rng.choice(NAME_WORDS)} {self.rng.choice(NAME_WORDS)}"
            else:
                name = self.rng.choice(NAMES)
            if name not in self.named:
                self.named.add(name)
                found.append(name)
        return found

    def code(self) -> str:
        return str(self.rng.randrange(1_000_000, 10_000_000))

    def _sentence(self) -> Piece:
        if self.rng.random() < 0.1:
            words = (encode(f" {word}") for word in self.rng.choices(WORDS, k=self.rng.randint(4, 12)))
            return said((*chain.from_iterable(words), *encode(".")))
        return self.rng.choice(sentences())

    def _plain(self, kind: Kind) -> list[Piece]:
        """Facts again and again: all but the first time they are to be predicted.

        The names too, whose second word the first one tells: that takes one token to find, and is learned before codes.
        """
        pieces = [said(encode(BOS))] if self.rng.random() < 0.5 else []
        names = self.names(self.rng.randint(2, kind.facts))
        facts = [(self.rng.choice((CODE, BADGE)), name, self.code()) for name in names]
        known: set[int] = set()
        filler = self.rng.choice((0.0, 0.3, 0.6))
        left = kind.length
        while left > 0:
            if self.rng.random() < filler:
                piece = self._sentence()
            else:
                number = self.rng.randrange(len(facts))
                piece = fact(*facts[number], mark=number in known)
                known.add(number)
            pieces.append(piece)
            left -= len(piece.tokens)
        return pieces

    def _questioned(self, kind: Kind) -> list[Piece]:
        """A text of sentences and facts as the probe's, then questions and answers."""
        form = self.rng.random()
        completed, transcript = form < 0.1, form > 0.85
        count = 1 if completed else self.rng.randint(1, kind.questions)
        # Of all captains one text can leave out one.
        asked = [self._asked(roll_call=not n) for n in range(count)]
        self.rng.shuffle(asked)
        opening = self._opening(transcript)
        if completed:
            turns = [completion(asked[0])]
        else:
            turns = [turn(one, first=not n) for n, one in enumerate(asked)]
        facts = [piece for one in asked for piece in one.facts]
        facts += [piece for _ in range(self.rng.randint(0, kind.facts)) for piece in self._distractors()]
        beside = len(encode(SPEAKERS[0])) if transcript else 0
        room = kind.length - sum(len(piece.tokens) for piece in (opening, *turns))
        room -= sum(len(piece.tokens) + beside for piece in facts)
        body: list[Piece] = []
        while room > LONGEST_SENTENCE + beside:
            sentence = self._sentence()
            room -= len(sentence.tokens) + beside
            body.append(sentence)
        for piece in facts:
            body.insert(self.rng.randint(0, len(body)), piece)
        if transcript:
            body = [join(said(encode(SPEAKERS[n % 2])), piece) for n, piece in enumerate(body)]
        return [opening, *body, *turns]

    def _opening(self, transcript: bool) -> Piece:
        salt = "".join(self.rng.choices(string.ascii_lowercase, k=12))
        return said((*encode(BOS + USER), *_fresh(f"Notebook {salt}."), *encode(TRANSCRIPT if transcript else HEADER)))

    def _distractors(self) -> list[Piece]:
        """Facts that nobody asks for, of which some share a name."""
        which = self.rng.random()
        if which < 0.3:
            return [courier_fact(*self.names(2))]
        name = self.names(1)[0]
        relations = (CODE, BADGE) if which < 0.5 else (self.rng.choice((CODE, BADGE)),)
        return [fact(relation, name, self.code()) for relation in relations]

    def _asked(self, roll_call: bool) -> Asked:
        which = self.rng.random()
        if which < 0.15 and roll_call:
            missing, *present = self.rng.sample(tasks.LAST, len(tasks.LAST))
            facts = [said(encode(f" Captain {name} reported.")) for name in present]
            return Asked(facts, tasks.ROLL_CALL, missing_captain(missing))
        if which < 0.4:
            (name, courier), code = self.names(2), self.code()
            facts = [courier_fact(name, courier), fact(CODE, courier, code)]
            reply = join(courier_said(name, courier), fact(CODE, courier, code, mark=True))
            return Asked(facts, f"What is the access code of the courier of {name}?", reply)
        if which < 0.5:
            known = [(name, self.code()) for name in self.names(self.rng.randint(2, 8))]
            names = [name for name, _ in known]
            question = f"What are the access codes of {', '.join(names[:-1])} and {names[-1]}?"
            reply = join(*((fact if n else answer)(CODE, *pair, mark=True) for n, pair in enumerate(known)))
            return Asked([fact(CODE, *pair) for pair in known], question, reply)
        relation, name, code = CODE if which < 0.85 else BADGE, self.names(1)[0], self.code()
        return Asked(
            [fact(relation, name, code)], f"What is the {relation} of {name}?", answer(relation, name, code)
        )  # fmt: skip

    def _positions(self, kind: Kind, lengths: list[int]) -> np.ndarray:
        steps: np.ndarray = np.ones(kind.length, np.int64)
        steps[0] = 0
        if self.rng.random() < kind.stretched:
            spare = exp(self.rng.uniform(log(64), log(kind.longest - kind.length)))
            starts = [start for start in np.cumsum(lengths)[:-1].tolist() if start < kind.length]
            gaps = self.rng.sample(starts, min(len(starts), self.rng.randint(1, 8)))
            shares = [self.rng.random() for _ in gaps]
            for gap, share in zip(gaps, shares, strict=True):
                steps[gap] += int(spare * share / sum(shares))
        return np.cumsum(steps)


@cache
def sentences() -> list[Piece]:
    """All random sentences of the probe, a space before each."""
    parts = product([who.capitalize() for who in tasks.WHO], tasks.DID, tasks.WHAT, tasks.WHERE, tasks.WHEN)
    return [said((*chain.from_iterable(encode(f" {part}") for part in each), *encode("."))) for each in parts]


def fact(relation: str, name: str, code: str, mark: bool = False) -> Piece:
    return _stated(encode(f" The {relation} of"), name, code, mark)


def answer(relation: str, name: str, code: str, mark: bool = True) -> Piece:
    """The same at the beginning of an answer, without the space before."""
    return _stated(encode(f"The {relation} of"), name, code, mark)


def _stated(start: Tokens, name: str, code: str, mark: bool) -> Piece:
    space, *digits = encode_code(code)
    before = (*start, *encode(f" {name}"), *encode(" is"), space)
    if not mark:
        return said((*before, *digits, *encode(".")))
    return join(said(before, SAID), said(tuple(digits), ASKED), said(encode("."), SAID))


def courier_fact(name: str, courier: str) -> Piece:
    return said((*encode(" The courier of"), *encode(f" {name}"), *encode(" is"), *encode(f" {courier}"), *encode(".")))


def courier_said(name: str, courier: str) -> Piece:
    """The same at the beginning of an answer."""
    start = (*encode("The courier of"), *encode(f" {name}"), *encode(" is"))
    return join(said(start, SAID), said(encode(f" {courier}"), ASKED), said(encode("."), SAID))


def missing_captain(name: str) -> Piece:
    return join(said(encode("It was Captain"), SAID), said(encode(f" {name}"), ASKED), said(encode("."), SAID))


def turn(asked: Asked, first: bool) -> Piece:
    """A question after the text, or after the answer to another, and its answer."""
    start = encode("\n\n") if first else encode("\n" + USER)
    question = (*start, *encode_question(asked.question), *encode(END + ASSISTANT))
    return join(said(question), asked.reply, said(encode(EOS), SAID))


def completion(asked: Asked) -> Piece:
    """A question in a text in which no one speaks, and the answer, whose beginning is part of the text."""
    start = asked.reply.marks.index(ASKED)
    # The answer's first word has a space before it here, and so other tokens.
    reply = _fresh(" " + tokenizer().decode(list(asked.reply.tokens[:start])))
    begun = said((*encode("\n\n"), *encode_question(asked.question), *reply))
    return join(begun, Piece(asked.reply.tokens[start:], asked.reply.marks[start:]), said(encode(EOS), SAID))


def encode_question(question: str) -> Tokens:
    return _fresh(f"Question: {question} Answer with nothing else.")


def _fresh(text: str) -> Tokens:
    """Not through the cache: a text that never comes back."""
    return tuple(tokenizer().encode(text, add_special_tokens=False).ids)
