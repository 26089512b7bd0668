"""How the modules of the package import each other, read from their sources."""

from __future__ import annotations

import ast
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def modules() -> dict[str, Path]:
    """The file of every module, by the name it is imported by."""
    homes = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    found = {}
    for package, folder in homes.items():
        for path in (ROOT / folder).rglob("*.py"):
            *parents, last = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *parents, *([] if last == "__init__" else [last])])] = path
    return found


def imported(name: str, paths: dict[str, Path]) -> set[str]:
    """The modules of ours that ``name`` imports, inside functions and for type checkers too.

    A package that is imported only on the way to one of its modules is not counted.
    """
    tree = ast.parse(paths[name].read_text())
    package = name.split(".") if paths[name].name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*parents, *([node.module] if node.module else [])])
            inside = {alias.name: f"{origin}.{alias.name}" for alias in node.names}
            found.update(full if full in paths else origin for full in inside.values())
    return found & paths.keys()


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    paths = modules()
    return {name: imported(name, paths) for name in paths}


def test_every_kind_of_import_is_seen(graph: dict[str, set[str]]) -> None:
    assert "msa_backend.config" in graph["msa_backend.plugin"]  # from a module, a name
    assert "msa_backend.refusals" in graph["msa_backend.sglang.startup"]  # from a package, a module
    assert "msa_backend.patches" in graph["msa_backend.patches.registry"]  # relative, a name
    assert "msa_backend.sglang.engine" in graph["msa_backend.sglang.registration"]  # relative, a module
    assert "msa_backend.vllm.registration" in graph["msa_backend.plugin"]  # in a function


def test_no_import_leads_back(graph: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        # Each of these imports the one after it.
        pytest.fail(" -> ".join(reversed(error.args[1])))
