"""Batches of lessons, each a function of the seed and its number: a run that goes on reads what it would have read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .plan import Phase
from .text import Lesson, Writer

ROWS = 48
"""Query positions of a text at which the indexer is taught, most of them where an answer is given."""


class Batch(NamedTuple):
    """
    Attributes:
        tokens: ``[batch, length]`` int64.
        marks: ``[batch, length]`` int8, as of `text.Lesson`.
        positions: ``[batch, length]`` int64.
        rows: ``[batch, ROWS]`` int64.
        before: ``[n]`` int64, of ``batch * length``, ascending: the tokens before those that are marked. Found here,
            since a device would make the host wait for how many they are.
    """

    tokens: Tensor
    marks: Tensor
    positions: Tensor
    rows: Tensor
    before: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(part.to(device, non_blocking=True) for part in self))


def batch(phase: Phase, seed: int, step: int) -> Batch:
    """That of the ``step``-th step of all."""
    writer = Writer(Random(f"{seed} {step}"))
    return collate([writer.lesson(phase.kind) for _ in range(phase.batch)], np.random.default_rng([seed, step]))


def collate(lessons: list[Lesson], rng: np.random.Generator) -> Batch:
    tokens, marks, positions = (np.stack(part) for part in zip(*lessons, strict=True))
    rows = np.stack([_rows(text, rng) for text in marks])
    before = np.flatnonzero(np.pad(marks[:, 1:], ((0, 0), (0, 1))))
    return Batch(*(torch.from_numpy(part) for part in (tokens, marks, positions, rows, before)))


def _rows(marks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    weights = np.full(len(marks), 1 / 3 / len(marks))
    asking = np.flatnonzero(marks[1:])
    if len(asking):
        weights[asking] += 2 / 3 / len(asking)
    return np.sort(rng.choice(len(marks), ROWS, replace=False, p=weights / weights.sum()))


class _Steps(Dataset):
    def __init__(self, phase: Phase, seed: int) -> None:
        self.phase, self.seed = phase, seed

    def __getitem__(self, step: int) -> Batch:
        return batch(self.phase, self.seed, step)


def batches(phase: Phase, seed: int, steps: range, workers: int, pinned: bool = False) -> Iterator[Batch]:
    """Those of ``steps``.

    Args:
        workers: processes that write them ahead; 0: they are written when they are wanted.
        pinned: whether in memory that a GPU copies from while it computes.
    """
    if not workers:
        return (batch(phase, seed, step) for step in steps)
    lessons = _Steps(phase, seed)
    ahead = 4
    return iter(
        DataLoader(
            lessons, batch_size=None, sampler=steps, num_workers=workers, prefetch_factor=ahead, pin_memory=pinned
        )
    )


def spare_cores() -> int:
    """Workers that leave cores to training; 0 where there are too few."""
    cores = len(os.sched_getaffinity(0))
    return min(12, cores - 2) if cores > 3 else 0
