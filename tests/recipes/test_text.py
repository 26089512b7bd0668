"""Lessons say what the probe says, and their answers are right."""

from __future__ import annotations

import re
from random import Random

import numpy as np
import pytest
from nano.evaluate import reply
from nano.plan import PLAN
from nano.shape import NANO
from nano.text import ASKED, SAID, Kind, Lesson, Writer, sentences
from nano.vocabulary import encode, tokenizer

from msa_backend.probe.tasks import TASKS, Place
from msa_backend.tiny.tokenizer import BOS, EOS, NUM_BYTES, PAD

QUESTIONED, PLAIN = Kind(1024, plain=0.0, questions=6), Kind(512, plain=1.0)


def text_of(lesson: Lesson) -> str:
    return tokenizer().decode(lesson.tokens.tolist(), skip_special_tokens=False).rstrip(PAD)


def lessons(kind: Kind, count: int = 60) -> list[Lesson]:
    writer = Writer(Random(5))
    return [writer.lesson(kind) for _ in range(count)]


def runs(lesson: Lesson, mark: int) -> list[str]:
    """The texts of all runs of tokens with this mark."""
    edges = np.flatnonzero(np.diff(lesson.marks == mark, prepend=False, append=False))
    return [tokenizer().decode(lesson.tokens[a:b].tolist()) for a, b in edges.reshape(-1, 2)]


@pytest.mark.parametrize("kind", [QUESTIONED, PLAIN], ids=["questioned", "plain"])
def test_lessons_have_their_length(kind: Kind):
    for lesson in lessons(kind):
        assert lesson.tokens.shape == lesson.marks.shape == lesson.positions.shape == (kind.length,)
        assert lesson.tokens.max() < len(tokenizer().get_vocab())
        assert lesson.marks.any()


@pytest.mark.parametrize("kind", [QUESTIONED, PLAIN], ids=["questioned", "plain"])
def test_tokens_are_the_tokenizers(kind: Kind):
    """Pieces are encoded apart: together they are what the tokenizer makes of the whole text."""
    for lesson in lessons(kind, 20):
        filled = lesson.tokens[lesson.tokens != encode(PAD)[0]].tolist()
        text = tokenizer().decode(filled, skip_special_tokens=False)
        assert tokenizer().encode(text, add_special_tokens=False).ids == filled


def test_facts_do_not_contradict_each_other():
    for lesson in lessons(QUESTIONED):
        notes = text_of(lesson).partition("Question:")[0]
        facts = re.findall(r"The ([\w ]+) of ([\w ]+?) is (\w[\w ]*)\.", notes)
        known = {(relation, name) for relation, name, _ in facts}
        assert len(known) == len(set(facts)) == len(facts)


def test_all_that_is_asked_for_stands_in_the_text_before():
    asked = 0
    for lesson in lessons(QUESTIONED):
        text = text_of(lesson)
        turn = r"Question: (.*?) Answer with nothing else\.(.*?)(?:\[e~\[\n\]~b\]user|$)"
        for question, said in re.findall(turn, text, re.DOTALL):
            notes = text.partition("\n\nQuestion:")[0]
            if "captains" in question:
                missing = re.search(r"Captain (\w+)\.", said)[1]
                assert f"Captain {missing} reported" not in notes and notes.count(" reported.") == 9
                asked += 1
                continue
            if "courier" in question:
                name, courier = re.search(r"The courier of ([\w ]+) is ([\w ]+)\.", said).groups()
                assert f"The courier of {name} is {courier}." in notes and name in question
            for relation, name, code in re.findall(r"(access code|badge number) of ([\w ]+) is (\d+)\.", said):
                assert f" The {relation} of {name} is {code}." in notes
                asked += 1
    assert asked > 100


def test_marks_are_on_answers():
    for lesson in lessons(QUESTIONED):
        for found in runs(lesson, ASKED):
            assert re.fullmatch(r"\d{7}| [\w ]+", found), found
        for found in runs(lesson, SAID):
            assert not set(found) & set("0123456789")


def test_plain_facts_are_asked_for_when_they_come_back():
    for lesson in lessons(PLAIN):
        codes = [match[0] for match in re.finditer(r"\d{7}", text_of(lesson))]
        again = [code for n, code in enumerate(codes) if code in codes[:n]]
        found = runs(lesson, ASKED)
        assert [code for code in found if len(code) == 7][: len(again) - 1] == again[: len(again) - 1]


def test_stretched_texts_reach_the_whole_window():
    ends = [int(lesson.positions[-1]) for lesson in lessons(Kind(256, stretched=1.0, plain=0.0, questions=1), 300)]
    assert max(ends) < 1 << 20 and max(ends) > 500_000
    near = [lesson.positions for lesson in lessons(Kind(256, stretched=0.0), 5)]
    assert all((positions == np.arange(256)).all() for positions in near)
    for lesson in lessons(Kind(256, stretched=1.0, plain=0.0, questions=1), 50):
        gaps = np.flatnonzero(np.diff(lesson.positions) != 1)
        assert 0 < len(gaps) <= 8
        assert (np.diff(lesson.positions) >= 1).all()


def test_every_sentence_of_the_probe_is_words():
    """Twelve tokens or so, not bytes."""
    for piece in sentences()[::500]:
        assert all(token >= NUM_BYTES for token in piece.tokens[:-1]) and len(piece.tokens) <= 14
    for name in ("Ada Abbott", "Lars Jansen"):
        assert len(encode(f" {name}")) == 2


@pytest.mark.parametrize("name", [*TASKS])
def test_the_probes_tasks_have_a_reply(name: str):
    """The reply that is evaluated scores at the probe, fits into its limit of tokens, and the model was taught it."""
    for seed in range(5):
        task = TASKS[name](Random(seed), Place(800, 0.3))
        piece = reply(name, task)
        assert task.score(tokenizer().decode(list(piece.tokens))) == 1.0
        assert len(piece.tokens) < (256 if name == "many" else 48)
        assert ASKED in piece.marks


def nameless(question: str) -> str:
    return re.sub(r"(courier|codes?|number) of (?!the )[^?]*\?", r"\1 of X?", question)


@pytest.mark.parametrize("name", ["needle", "two-hop", "many", "roll-call"])
def test_lessons_look_like_the_probes_prompts(name: str):
    """Words apart, the beginning, and the way from a text to its answer, are the same."""
    task = TASKS[name](Random(1), Place(300, 0.5))
    prompt = f"{BOS}]~b]user\n{task.text}{EOS}\n]~b]ai\n"
    texts = [text_of(lesson) for lesson in lessons(QUESTIONED, 100)]
    header = re.compile(r"Notebook [a-z]{12}\. Read these notes\. One question about them follows\.\n\n")
    assert header.search(prompt)
    assert sum(bool(header.search(text)) for text in texts) > 50
    question = prompt[prompt.index("Question:") :]
    asked = [found for text in texts for found in re.findall(r"Question: .*?\]~b\]ai\n", text, re.DOTALL)]
    assert nameless(question) in {nameless(one) for one in asked}


def test_the_plan_is_for_the_model():
    assert PLAN[-1].topk == NANO.topk
    assert {phase.kind.longest for phase in PLAN} == {NANO.max_positions}
    assert len({phase.name for phase in PLAN}) == len(PLAN)
    for phase in PLAN:
        assert phase.kind.length // phase.block >= 16, "with fewer blocks there is no choice to learn"
