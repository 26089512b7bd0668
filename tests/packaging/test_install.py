"""msa-backend installed from its wheel, from its sdist and editable, where there is neither engine nor torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from msa_backend import __version__

if TYPE_CHECKING:
    from conftest import Environment

ROOT = Path(__file__).parents[2]
HEAVY = ("numpy", "torch", "transformers", "triton", "sglang", "vllm")

TIME_IMPORT = """
import sys, time
started = time.perf_counter()
import msa_backend
print(time.perf_counter() - started)
"""

FIND = """
import importlib.util, json, sys
specs = {name: importlib.util.find_spec(name) for name in sys.argv[1:]}
print(json.dumps({name: spec and spec.origin for name, spec in specs.items()}))
"""


def test_the_mapped_folders_are_found_inside_the_package(installed: Environment) -> None:
    for name in ("kernels", "model", "patches"):
        assert import_module(f"msa_backend.{name}")
        origin = json.loads(installed.run("python", "-c", FIND, f"msa_backend.{name}"))[f"msa_backend.{name}"]
        assert Path(origin).is_file()
        assert not Path(origin).is_relative_to(ROOT), "the test found this checkout instead of what it installed"


def test_no_module_of_a_common_name_is_installed(installed: Environment, checkout: Path) -> None:
    names = ("kernels", "model", "patches", "tests", "tools", "benchmarks", "recipes", "nano")
    found = json.loads(installed.run("python", "-c", FIND, *names, cwd=checkout, PYTHONSAFEPATH="1"))
    assert found == dict.fromkeys(names)


def test_a_server_started_in_the_repository_does_not_see_our_kernels_folder() -> None:
    """SGLang and transformers look for a package called `kernels`."""
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    out = subprocess.check_output([sys.executable, "-c", FIND, "kernels"], cwd=ROOT, env=environment, text=True)
    origin = json.loads(out)["kernels"]
    assert origin is None or not Path(origin).is_relative_to(ROOT / "kernels")


def test_the_command_runs(installed: Environment) -> None:
    assert installed.run("msa-backend", "--version").strip() == f"msa-backend {__version__}"
    report = json.loads(installed.run("msa-backend", "doctor", "--json"))
    assert report["versions"]["torch"] is None, "something in this environment hides that torch is not needed"
    assert report["entry_points"] == {
        "vllm.general_plugins": "msa_backend.plugin:register_vllm",
        "sglang.srt.plugins": "msa_backend.plugin:register_sglang",
    }
    assert report["problems"] == []


def test_engines_find_the_entry_points(installed: Environment) -> None:
    script = """
from importlib.metadata import entry_points
for group in ("vllm.general_plugins", "vllm.platform_plugins", "sglang.srt.plugins"):
    for point in entry_points(group=group):
        print(group, point.name, point.load().__name__)
"""
    assert installed.run("python", "-c", script).splitlines() == [
        "vllm.general_plugins msa register_vllm",
        "vllm.platform_plugins msa platform_plugin",
        "sglang.srt.plugins msa register_sglang",
    ]


def test_importing_is_instant(installed: Environment) -> None:
    """The best of five fresh interpreters, since a busy machine can only add to the time.

    It takes about a millisecond; 0.1 s is what somebody would begin to notice. torch alone takes
    ten times as long to import, so no heavy import can hide below the bound.
    """
    best = min(float(installed.run("python", "-c", TIME_IMPORT)) for _ in range(5))
    assert best < 0.1


@pytest.mark.parametrize("module", ["msa_backend", "msa_backend.cli", "msa_backend.doctor", "msa_backend.plugin"])
def test_importing_loads_nothing_heavy_where_it_could(module: str) -> None:
    """Asked of the environment the tests run in, where torch and perhaps an engine are installed."""
    script = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "[]"
