"""Which Python makes an environment: tools/find_python and tools/setup_env.py say the same of each engine."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
VERSIONS = [(3, minor) for minor in range(10, 16)]
NAMES = ("python3.11", "python3.12", "python3.13", "python3", "python")


@pytest.fixture(scope="module")
def setup_env() -> ModuleType:
    spec = spec_from_file_location("setup_env", ROOT / "tools" / "setup_env.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["setup_env"] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def found(engine: str, pythons: Path) -> subprocess.CompletedProcess[str]:
    """What find_python prints where only ``pythons`` are on the path."""
    script = ["/bin/sh", ROOT / "tools" / "find_python", engine]
    return subprocess.run(script, env={"PATH": str(pythons)}, capture_output=True, text=True)


def pretend(folder: Path, name: str, version: tuple[int, int]) -> None:
    """Put a Python of another version there: this one, which says so."""
    change = f"import sys; sys.version_info = ({version[0]}, {version[1]}, 0); exec(sys.argv[2])"
    script = folder / name
    script.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{change}' \"$@\"\n")
    script.chmod(0o755)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("version", VERSIONS)
def test_the_one_python_of_a_machine(engine: str, version: tuple[int, int], setup_env: ModuleType, tmp_path: Path):
    pretend(tmp_path, "python3", version)
    result = found(engine, tmp_path)
    refusal = setup_env.refuse(setup_env.ENGINES[engine], version)
    assert (result.returncode == 0) == (refusal is None)
    if refusal is None:
        assert result.stdout == "python3\n"
    else:
        assert f"Python {version[0]}.{version[1]} is not from 3.11 to" in refusal
        assert "make PYTHON=/path/to/python" in refusal
        assert result.stderr.count("\n") == 1
        assert "make PYTHON=/path/to/python" in result.stderr


def test_several_pythons(tmp_path: Path):
    pretend(tmp_path, "python3", (3, 10))
    for name in ("python3.13", "python3.12"):
        pretend(tmp_path, name, (3, int(name[-2:])))
    assert found("vllm", tmp_path).stdout == found("sglang", tmp_path).stdout == "python3.12\n"


def test_pythons_that_fail_when_run(tmp_path: Path):
    for name in NAMES:
        (tmp_path / name).write_text("#!/bin/sh\nexit 127\n")
        os.chmod(tmp_path / name, 0o755)
    assert found("vllm", tmp_path).returncode == 1
