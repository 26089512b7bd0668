"""The trace that `vllm bench serve` replays: turns extend prompts, and almost all of a prompt was there before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from engine import conversations
from engine.conversations import Shape
from engine.prompts import BLOCK


def test_96_percent_are_cached_as_it_comes() -> None:
    trace = conversations.make(Shape(), seed=0)
    assert len(trace) == Shape().conversations * Shape().turns
    assert 0.955 < conversations.cached_share(trace) < 0.975


def test_a_turn_extends_the_last_one() -> None:
    shape = Shape(conversations=3, turns=4, shared=256, first=128)
    trace = conversations.make(shape, seed=1)
    for number in range(shape.conversations):
        turns = trace[number :: shape.conversations]
        for before, after in zip(turns, turns[1:], strict=False):
            new = after["input_length"] - before["input_length"] - before["output_length"]
            assert new in conversations.NEW
            assert after["hash_ids"][: len(before["hash_ids"])] == before["hash_ids"]
    for request in trace:
        assert len(request["hash_ids"]) == -(-request["input_length"] // BLOCK)


def test_conversations_share_the_system_prompt_and_nothing_else() -> None:
    first, second = conversations.make(Shape(conversations=2, turns=1, shared=256, first=1024), seed=0)
    common = set(first["hash_ids"]) & set(second["hash_ids"])
    assert common == set(first["hash_ids"][:2])


def test_the_same_seed_makes_the_same_trace_and_another_shares_no_block() -> None:
    first, again, other = (conversations.make(Shape(), seed) for seed in (0, 0, 1))
    assert first == again
    blocks = [{block for request in trace for block in request["hash_ids"]} for trace in (first, other)]
    assert not blocks[0] & blocks[1]


@pytest.mark.parametrize(("lengths", "share"), [((256, 256), 0.5), ((256, 300), 256 / 556), ((100, 100), 0)])
def test_cached_share_counts_whole_blocks(lengths: tuple[int, int], share: float) -> None:
    trace = [{"input_length": length, "hash_ids": list(range(-(-length // BLOCK)))} for length in lengths]
    assert conversations.cached_share(trace) == pytest.approx(share)


def test_a_line_a_request(tmp_path: Path) -> None:
    trace = conversations.make(Shape(conversations=1, turns=2), seed=0)
    conversations.write(trace, tmp_path / "trace.jsonl")
    lines = (tmp_path / "trace.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == trace
