"""Where a check finds things: the repository, the engines' interpreters, models, results."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
COMMON = {"HF_HUB_OFFLINE": "1", "MSA_ALLOW_UNTESTED": "1", "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class Host:
    """What a run was given.

    Attributes:
        work: for models, the tests' copy, results until they are packed.
        pythons: the interpreter of each engine.
        paths: PYTHONPATH of each engine, where it is not this process's.
        truth: a folder with `tiny/` and `truth.json`, if both were written elsewhere.
        expression: which tests, as pytest's `-k`.
    """

    work: Path
    pythons: Mapping[str, str]
    paths: Mapping[str, str] = field(default_factory=dict)
    truth: Path | None = None
    expression: str | None = None

    @property
    def results(self) -> Path:
        """The folder that is packed."""
        return self.work / "results"

    @property
    def tree(self) -> Path:
        """The folder that tests run in: the repository's own has packages that shadow others."""
        return self.work / "tree"

    def model(self, name: str) -> Path:
        return self.work / "models" / name

    def result(self, name: str) -> Path:
        return self.results / f"{name}.json"

    def log(self, name: str) -> Path:
        return self.results / f"{name}.log"

    def environment(self, engine: str, **more: str) -> dict[str, str]:
        """Variables of an engine's processes, beside this one's."""
        path = {"PYTHONPATH": self.paths[engine]} if engine in self.paths else {}
        return COMMON | ENVIRONMENT[engine]() | path | more

    def benchmark(self, engine: str, *words: Any) -> tuple[str, ...]:
        """`benchmarks/engine` with arguments; a dict among them is written as JSON."""
        said = [json.dumps(word) if isinstance(word, dict) else str(word) for word in words]
        return self.pythons[engine], str(REPOSITORY / "benchmarks" / "engine"), *said

    def prepare(self) -> None:
        """Make the folders and copy the tests; results of an earlier run there are deleted."""
        shutil.rmtree(self.results, ignore_errors=True)
        for folder in (self.results, self.tree, self.work / "models"):
            folder.mkdir(parents=True, exist_ok=True)
        for name in ("tests", "docs"):
            shutil.copytree(
                REPOSITORY / name, self.tree / name, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True
            )
        for name in ("pyproject.toml", "README.md"):
            shutil.copy(REPOSITORY / name, self.tree)


def of_vllm() -> dict[str, str]:
    # Of many engines at once, each would compile with all cores.
    return {"VLLM_NO_USAGE_STATS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "2"}


def of_sglang() -> dict[str, str]:
    found = {"SGLANG_CUDA_COREDUMP_BEFORE_CRASH_WAIT_SECS": "0"}
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if "CUDA_HOME" not in os.environ and Path(nvcc).exists():
        # SGLang links what it compiles by CUDA_HOME/lib64, which is not beside a link to nvcc.
        found["CUDA_HOME"] = str(Path(nvcc).resolve().parents[1])
    return found


ENVIRONMENT = {"vllm": of_vllm, "sglang": of_sglang}
