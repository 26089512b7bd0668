"""What the suite asks of an engine, in words that belong to none.

A driver answers for one engine: it starts it with given options, in this process's children or as the server a user
runs, asks it, reads its counters, and knows its names of the options and what it lacks.

Device and dtype come from ``tests/device.py`` alone. ``MSA_TEST_DEVICE=cuda`` is how the suite is meant to run on a
GPU, in bf16: what compares with fp32 then skips, and the rest is held against ``transformers`` in fp32 by how far
``transformers`` in bf16 is from it. So far it ran on CPUs alone, there with ``MSA_TEST_DTYPE=bfloat16`` too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar

from ...server import Server, running
from ..capabilities import Can, Lack
from .options import Options, Parsed, as_flags
from .running import Engine, EngineServer


class Driver(ABC):
    """One engine.

    Attributes:
        package: what is imported.
        title: its name in sentences and in the tables of docs/what-works.md.
        names: by option of ``Options``, this engine's own name of the same thing, which takes the same value.
        switches_off: flags that turn off what is on by default, by option.
        other_backend: an attention backend of the engine's own that serves dense layers on a CPU.
        left_of_msa: what start-up leaves of ``--attention-backend msa``.
        no_images: words of the answer to an image.
        thought: the field of a message of the OpenAI protocol that holds a thought.
        versions: (version, whether the plugin warns of it).
        unfit: a version without what is registered with, the error, and what it says.
        registered: code whose last line of output says, word by word, what of the plugin is registered.
        ask_for_msa: code that parses options with ``--attention-backend msa`` and fails where that is no backend.
        unknown_backend: what it then says.
    """

    package: ClassVar[str]
    title: ClassVar[str]
    names: ClassVar[Mapping[str, str]]
    switches_off: ClassVar[Mapping[str, str]]
    other_backend: ClassVar[str]
    left_of_msa: ClassVar[str | None]
    no_images: ClassVar[str]
    thought: ClassVar[str]
    versions: ClassVar[Sequence[tuple[str, bool]]]
    unfit: ClassVar[tuple[str, type[BaseException], str]]
    registered: ClassVar[str]
    ask_for_msa: ClassVar[str]
    unknown_backend: ClassVar[str]
    lacks_anywhere: ClassVar[Mapping[Can, Lack]] = {}
    lacks_on_cpu: ClassVar[Mapping[Can, Lack]] = {}

    def lacks(self, device: str, dtype: str) -> dict[Can, Lack]:
        """What the engine cannot do there."""
        found = {**self.lacks_anywhere}
        if device == "cpu":
            found |= self.lacks_on_cpu
        elif gpus() < 2:
            found[Can.TENSOR_PARALLEL] = Lack("one GPU has one rank")
        if dtype != "float32":
            found[Can.FP32] = Lack(f"the suite runs in {dtype} here")
        return found

    def flag(self, option: str) -> str:
        """The command line's name of an option; of a switch that is on by default, of its opposite."""
        return self.switches_off.get(option) or "--" + self.names[option].replace("_", "-")

    @abstractmethod
    def arguments(self, model: Path, options: Options) -> dict[str, Any]:
        """``options`` by the engine's own names; without those that are None."""

    @abstractmethod
    def environment(self, options: Options) -> dict[str, str]:
        """Variables that the engine's processes need."""

    def where(self, options: Options) -> dict[str, str]:
        """Variables that choose the processes of an engine without a server."""
        return {}

    @abstractmethod
    def launch(self, model: Path, arguments: Mapping[str, Any]) -> AbstractContextManager[Engine]:
        """An engine in this process or in children of it."""

    @abstractmethod
    def resolve(self, model: Path, arguments: Mapping[str, Any]) -> Parsed:
        """All that a start does before it starts a process."""

    @abstractmethod
    def serve_command(self, model: Path) -> Sequence[str | Path]:
        """What starts a server."""

    @abstractmethod
    def serve_arguments(self) -> dict[str, Any]:
        """Options that only a server has: its name of the model, and counters as they are now."""

    @abstractmethod
    def wrap(self, http: Server) -> EngineServer:
        """The running server's own ways."""

    @abstractmethod
    def load_plugins(self) -> None:
        """What the engine itself calls in each of its processes."""

    @abstractmethod
    def model_module(self, architecture: str) -> str:
        """Where the class comes from that will serve models of ``architecture``."""

    @abstractmethod
    def registration(self) -> list[Any]:
        """The objects that the plugin registered in this process."""

    def given(self, options: Options) -> dict[str, Any]:
        """The options whose values the engine takes as they are, by its own names; without those that are None."""
        named = {name: getattr(options, option) for option, name in self.names.items()}
        return {name: value for name, value in named.items() if value is not None}

    @contextmanager
    def engine(self, model: Path, **options: Any) -> Iterator[Engine]:
        """A running engine; ``options`` are those of ``Options``."""
        chosen = Options(**options)
        variables = self.environment(chosen) | self.where(chosen)
        with in_environment(variables), self.launch(model, self.arguments(model, chosen)) as engine:
            yield engine

    @contextmanager
    def server(self, model: Path, **options: Any) -> Iterator[EngineServer]:
        """The server a user runs.

        Raises:
            RuntimeError: it ended by itself; the message is what it printed.
        """
        chosen = Options(**options)
        flags = as_flags(self.arguments(model, chosen) | self.serve_arguments())
        with running(self.serve_command(model), flags, self.environment(chosen)) as http:
            yield self.wrap(http)

    def parse(self, model: Path, **options: Any) -> Parsed:
        """What a start with ``options`` makes of them before it starts a process.

        Raises:
            MSAError: the plugin refuses them.
        """
        return self.resolve(model, self.arguments(model, Options(**options)))

    def run(self, code: str, **environment: str) -> str:
        """Standard output of ``code`` in a new interpreter that has loaded no plugin yet.

        Raises:
            RuntimeError: it failed; the message is what it printed.
        """
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=self.inherited() | self.environment(Options()) | environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
        return done.stdout

    def prepare(self) -> None:
        """Load the plugin into this process, which needs some variables before it sees the engine."""
        os.environ.update(self.environment(Options()))
        self.load_plugins()

    def inherited(self) -> dict[str, str]:
        """This process's environment, without what the plugin has left there for children."""
        return dict(os.environ)


@contextmanager
def in_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set them for what is started inside."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def gpus() -> int:
    """How many there are."""
    import torch

    return torch.cuda.device_count()


def two_cores() -> str:
    """The first and the last core that this process may use, one for each of two ranks."""
    cores = sorted(os.sched_getaffinity(0))
    return f"{cores[0]}|{cores[-1]}"
