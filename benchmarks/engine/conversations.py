"""A trace of agents at work: many turns each, every prompt the last one and a little more, all with one system prompt.

It is written in the form of traces that name the blocks of a prompt instead of its words, which `vllm bench serve`
replays with `--dataset-name timed_trace`; that needs no network and no package beyond vLLM's own. The words of an
answer in the trace are not those that the model says, so a turn reads the last answer anew, as an agent whose tool
rewrote it would.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.prompts import BLOCK

NEW = (64, 128, 171, 171, 256, 347, 512, 1024)  # tokens a turn adds: a tool's result, a question
ANSWER = (24, 48, 64, 96)
BLOCKS_OF_ONE = 1 << 20  # names of blocks that a conversation has to itself


@dataclass(frozen=True)
class Shape:
    """How long conversations are.

    Attributes:
        conversations: that go on side by side, turn by turn; with twice as many as the server works on at once, a turn
            comes when the last one's answer is there.
        turns: of each.
        shared: tokens of the system prompt.
        first: tokens of the first prompt after it.
    """

    conversations: int = 16
    turns: int = 24
    shared: int = 8192
    first: int = 8192


def make(shape: Shape, seed: int) -> list[dict[str, Any]]:
    """Requests in the order they are sent: `timestamp`, `input_length`, `output_length`, `hash_ids` a block of 128.

    Another seed shares no block with this one.
    """
    rng = random.Random(f"conversations:{seed}")
    shared_blocks = shape.shared // BLOCK
    root = seed * (shape.conversations + 1) * BLOCKS_OF_ONE
    lengths = [shape.shared + shape.first] * shape.conversations
    trace = []
    for _ in range(shape.turns):
        for number in range(shape.conversations):
            lengths[number] += rng.choice(NEW)
            answer = rng.choice(ANSWER)
            blocks = -(-lengths[number] // BLOCK)
            own = root + (number + 1) * BLOCKS_OF_ONE
            ids = [(root if block < shared_blocks else own) + block for block in range(blocks)]
            trace.append({"timestamp": 0.0, "input_length": lengths[number], "output_length": answer, "hash_ids": ids})
            lengths[number] += answer
    return trace


def cached_share(trace: Sequence[dict[str, Any]]) -> float:
    """The share of all prompt tokens that a prefix cache which forgets nothing finds."""
    known: set[int] = set()
    found = 0
    for request in trace:
        whole = request["hash_ids"][: request["input_length"] // BLOCK]
        hit = next((number for number, block in enumerate(whole) if block not in known), len(whole))
        found += hit * BLOCK
        known.update(whole)
    return found / sum(request["input_length"] for request in trace)


def write(trace: Iterable[dict[str, Any]], file: Path) -> None:
    file.write_text("".join(json.dumps(request) + "\n" for request in trace))
