"""Every example runs as its head says, and says something."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {
    "kernels_alone": ("torch", {}),
    "in_a_notebook": ("transformers", {}),
    "offline_vllm": ("vllm", {}),
    "offline_sglang": ("sglang", {"SGLANG_USE_CPU_ENGINE": "1"}),
}


def test_every_example_is_run_and_listed():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(NEEDS)
    listed = (EXAMPLES / "README.md").read_text()
    assert all(f"[{name}.py]({name}.py)" in listed for name in NEEDS)


@pytest.mark.parametrize("name", NEEDS)
def test_example(name: str, tiny: Path, tmp_path: Path):
    package, variables = NEEDS[name]
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", *([] if name == "kernels_alone" else [tiny])],
        cwd=tmp_path,
        env=os.environ | variables | {"PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.strip().splitlines()[-1]
    assert said == "output: (4, 64, 128)" if name == "kernels_alone" else len(said) > 20
