"""Cells, each a task at a length and a depth, asked several at a time; what is done is never lost."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .client import Client, ProbeError
from .tasks import TASKS, Place, at_boundary

BOUNDARY = "boundary"
OFFSETS = (0, 64, 126, 127)
"""Of a fact's first token in its block: from 126 on it lies in two blocks."""
ANSWER_TOKENS = {"many": 256}
DEFAULT_ANSWER_TOKENS = 48
KEPT_FREE = 512
"""Tokens of the server's limit for the chat template and the answer."""


@dataclass(frozen=True)
class Cell:
    """
    Attributes:
        task: one of TASKS, or BOUNDARY.
        length: of the prompt in tokens, about; of BOUNDARY exactly.
        depth: from 0 to 1; of BOUNDARY the offset in its block.
    """

    task: str
    length: int
    depth: float

    @property
    def key(self) -> str:
        return f"{self.task} @ {self.length} @ {self.depth:g}"


@dataclass(frozen=True)
class Settings:
    """What a result depends on; one with others is not gone on with."""

    model: str
    repeats: int
    seed: int
    cached: bool


def grid(tasks: Iterable[str], lengths: Iterable[int], depths: Iterable[float]) -> list[Cell]:
    """Short ones first."""
    tasks, depths = list(tasks), list(depths)
    return [
        Cell(task, length, depth)
        for length in sorted(lengths)
        for task in tasks
        for depth in (OFFSETS if task == BOUNDARY else depths)
    ]


class Scale(NamedTuple):
    """How many words make a prompt of so many tokens, by the server's own count.

    Attributes:
        words_per_token: of the filler.
        overhead: tokens of all else: the template, the facts, the question.
    """

    words_per_token: float
    overhead: float

    def words(self, tokens: int) -> int:
        return max(0, int((tokens - self.overhead) * self.words_per_token))


def calibrate(client: Client, shortest: int) -> Scale:
    """By two prompts that are shorter than ``shortest`` tokens, whatever a word is to the server."""
    words, tokens = [], []
    for share in (32, 8):
        task = TASKS["needle"](random.Random(0), Place(shortest // share, 0.5))
        words.append(len(task.text.split()))
        tokens.append(client.ask(task.text, 1).prompt_tokens)
    if tokens[1] <= tokens[0]:
        raise ProbeError(
            f"the server counts {tokens[0]} tokens in a prompt and {tokens[1]} in a longer one; it must count"
        )
    slope = (words[1] - words[0]) / (tokens[1] - tokens[0])
    return Scale(slope, tokens[0] - shortest // 32 / slope)


class Results:
    """A file of finished cells, written anew after each, so that an interrupted run goes on where it was.

    Raises:
        ProbeError: the file holds another run's results, or none.
    """

    def __init__(self, path: Path | None, settings: Settings) -> None:
        self.path, self.settings = path, settings
        self.cells: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            try:
                found = json.loads(path.read_text())
                known, self.cells = found["settings"], found["cells"]
            except (ValueError, KeyError, TypeError):
                raise ProbeError(f"{path} holds no results of a probe; name another file with --json") from None
            if known != asdict(settings):
                raise ProbeError(
                    f"{path} holds results of {known}, not of {asdict(settings)}; name another with --json"
                )

    def add(self, cell: Cell, result: dict[str, Any]) -> None:
        self.cells[cell.key] = {"task": cell.task, "length": cell.length, "depth": cell.depth} | result
        if self.path is not None:
            partial = self.path.with_suffix(self.path.suffix + ".partial")
            partial.write_text(json.dumps({"settings": asdict(self.settings), "cells": self.cells}, indent=1))
            partial.replace(self.path)


def measure(
    client: Client, cells: list[Cell], results: Results, scale: Scale, concurrency: int
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Ask all cells that have no result yet, and add theirs as they come.

    Args:
        scale: of the server.
    """
    left = [cell for cell in cells if cell.key not in results.cells]
    with ThreadPoolExecutor(concurrency) as pool:
        asked = {pool.submit(_ask, client, cell, results.settings, scale): cell for cell in left}
        try:
            for done in as_completed(asked):
                cell, result = asked[done], done.result()
                results.add(cell, result)
                yield cell, result
        finally:
            pool.shutdown(cancel_futures=True)


def _ask(client: Client, cell: Cell, settings: Settings, scale: Scale) -> dict[str, Any]:
    tries = [_try(client, cell, settings, repeat, scale) for repeat in range(settings.repeats)]
    result: dict[str, Any] = {
        "score": statistics.fmean(found["score"] for found in tries),
        "seconds": statistics.median(found["seconds"] for found in tries),
        "prompt_tokens": tries[0]["prompt_tokens"],
    }
    if settings.cached:
        result["score_cached"] = statistics.fmean(found["score_cached"] for found in tries)
        result["cached_tokens"] = tries[0]["cached_tokens"]
    return result


def _try(client: Client, cell: Cell, settings: Settings, repeat: int, scale: Scale) -> dict[str, Any]:
    rng = random.Random(f"{settings.seed} {cell.key} {repeat}")
    prompt: str | list[int]
    score: Callable[[str], float]
    if cell.task == BOUNDARY:
        prompt, code = at_boundary(rng, client.tokenize, cell.length, int(cell.depth))
        score = lambda answer: float(code in answer)  # noqa: E731
    else:
        task = TASKS[cell.task](rng, Place(scale.words(cell.length), cell.depth))
        prompt, score = task.text, task.score
    tokens = ANSWER_TOKENS.get(cell.task, DEFAULT_ANSWER_TOKENS)
    cold = client.ask(prompt, tokens)
    result: dict[str, Any] = {
        "score": score(cold.text), "seconds": cold.seconds, "prompt_tokens": cold.prompt_tokens
    }  # fmt: skip
    if settings.cached:
        again = client.ask(prompt, tokens)
        result |= {"score_cached": score(again.text), "cached_tokens": again.cached_tokens}
    return result
