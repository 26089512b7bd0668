"""What is asked of an engine under measurement, in words that belong to none: a request, a batch, a profile."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

# Rows of a batch are stopped by us, or end here.
LONGEST_ANSWER = 16_384
IN_TREE = "MSA_DISABLE"
CANDIDATES = 20
"""Most likely tokens whose log-probabilities are kept of each place of an answer: as many as vLLM gives by default."""


@dataclass(frozen=True)
class FirstToken:
    """Seconds to a prompt's first token.

    Attributes:
        wall: from handing over the prompt to reading the token.
        engine: from the scheduler's queue to the token, by the engine's clock; without what the front end does. None of
            an engine that does not say.
        cached: prompt tokens found in the prefix cache.
    """

    wall: float
    engine: float | None
    cached: int


class Session(ABC):
    """One running engine. Create it under `if __name__ == "__main__"`: engines may start their processes by spawning.

    Attributes:
        start_seconds: that it took to start.
        resolved: the settings that it chose or changed: `max_model_len`, `max_num_seqs`, `kv_cache_tokens`, `layers`,
            `model_class` and more.
    """

    start_seconds: float
    resolved: dict[str, Any]

    def header(self) -> dict[str, Any]:
        """What this engine is, for the record."""
        return {"start_seconds": round(self.start_seconds, 1), "resolved": self.resolved}

    @property
    def kv_tokens(self) -> int:
        return self.resolved["kv_cache_tokens"]

    @property
    def max_model_len(self) -> int:
        return self.resolved["max_model_len"]

    def check_class(self, is_ours: bool, engine: str) -> None:
        """Refuse to measure another class than this process was started for."""
        if is_ours == (os.environ.get(IN_TREE) == "1"):
            raise RuntimeError(
                f"The engine runs {self.resolved['model_class']}, but this process was to measure "
                f"{f'{engine} in-tree' if is_ours else 'msa-backend'}; run `msa-backend doctor`."
            )

    @abstractmethod
    def first_token(self, tokens: list[int]) -> FirstToken:
        """Ask for one token, with nothing else running."""

    @abstractmethod
    def ask(self, tokens: list[int], new: int, *, fresh: bool = False) -> dict[str, Any]:
        """A greedy answer of `new` tokens, with nothing else running; if `fresh`, nothing comes from the prefix cache.

        Returns:
            `tokens`; `candidates`, at each place the log-probabilities of the CANDIDATES most likely tokens, and of the
            one that was said, by token as text; `cached_tokens`; and, of a fresh one, `prompt`: the log-probability of
            each token of the prompt but the first.
        """

    @abstractmethod
    def batch(self) -> Batch:
        """An empty batch."""

    @abstractmethod
    def profile(self) -> AbstractContextManager[list[Path]]:
        """Profile what the engine does inside; at the end the list holds the files of the trace, one a rank."""

    def drafts(self) -> dict[str, Any]:
        """What the engine counted of drafts so far; nothing where none are made."""
        return {}


class Batch(ABC):
    """Requests that decode side by side, a token each in every step, until `stop`."""

    SHORTEST_WINDOW: ClassVar[int] = 1
    """Steps that a sample must be the mean of."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.names: set[str] = set()

    def add(self, tokens: list[int]) -> None:
        room = self.session.max_model_len - len(tokens)
        self.names.add(self.session.start(tokens, min(LONGEST_ANSWER, room)))

    def stop(self) -> None:
        self.session.stop(self.names)
        self.names = set()

    @abstractmethod
    def steps(self, count: int) -> list[float]:
        """When each of `count + 1` steps in a row ended, in seconds of the engine's clock.

        Only steps in which every request of the batch got a token count: none of them reads a prompt.

        Raises:
            RuntimeError: a request came to its end first.
        """

    @abstractmethod
    def steps_from_now(self, count: int) -> None:
        """Run on until the engine has made `count` steps more; outputs of earlier ones may still be on their way."""

    def ended(self) -> RuntimeError:
        return RuntimeError(f"A request of a batch of {len(self.names)} ended before it was measured.")
