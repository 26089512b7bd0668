"""A run in its folder: a checkpoint that is whole or not there, and the loss curve as far as the checkpoint reaches."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import torch

COLUMNS = ("step", "phase", "loss", "right", "bound", "lesson", "recall", "seconds")
"""Of the loss curve: ``right`` is the share of right tokens among those asked for, ``bound`` among the first of each
answer, which takes finding it; ``lesson`` the indexer's loss, ``recall`` as of `model.Reading`, the worst layer's."""


@dataclass
class State:
    """Where a run is.

    Attributes:
        seed: of the first weights and all texts.
        phase: number of the phase in the plan.
        step: of all phases together.
        phase_step: steps made in this phase.
        recent: ``bound`` of the last steps of the phase, for its end.
        rows: of the loss curve.
    """

    seed: int
    phase: int = 0
    step: int = 0
    phase_step: int = 0
    recent: list[float] = field(default_factory=list)
    rows: list[list[Any]] = field(default_factory=list)


def checkpoint(run: Path) -> Path:
    return run / "checkpoint.pt"


def save(run: Path, state: State, model: dict[str, Any], optimizer: dict[str, Any]) -> None:
    content = {"state": vars(state), "model": model, "optimizer": optimizer}
    run.mkdir(parents=True, exist_ok=True)
    replace(checkpoint(run), lambda path: torch.save(content, path))
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(state.rows)
    replace(run / "curve.csv", lambda path: path.write_text(text.getvalue()))


def load(run: Path, device: torch.device) -> tuple[State, dict[str, Any], dict[str, Any]]:
    content = torch.load(checkpoint(run), map_location=device, weights_only=True)
    return State(**content["state"]), content["model"], content["optimizer"]


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside ``path``, then put it there in one step: whoever looks finds the old file or the new one."""
    partial = path.with_suffix(path.suffix + ".partial")
    write(partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)
