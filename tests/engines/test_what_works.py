"""docs/what-works.md says of each engine on a CPU what its driver says, and every "works" has a test.

The columns for GPUs are left out: this suite has not run there.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .capabilities import NO_ROW, Can
from .drivers import DRIVERS
from .drivers.base import Driver

PAGE = Path(__file__).parents[2] / "docs" / "what-works.md"
NO = ("not yet", "not tested", "written, not tested", "-")
OPTIONS = {
    "this backend": "backend",
    "longest context": "context",
    "tokens computed in a step": "chunk",
    "page size": "page_size",
    "no prefix caching": "prefix_caching",
    "ranks": "ranks",
}
each_driver = pytest.mark.parametrize("driver", DRIVERS, ids=[driver.title for driver in DRIVERS])


def tables() -> list[list[dict[str, str]]]:
    """Of each table the rows, by the names of its columns."""
    found = []
    for lines in re.findall(r"(?:^\|.*\n)+", PAGE.read_text(), re.MULTILINE):
        names, _, *rows = ([text.strip() for text in line.strip("|").split("|")] for line in lines.splitlines())
        found.append([dict(zip(names, row, strict=True)) for row in rows])
    return found


WORKS, SAME = tables()


def cell(rows: list[dict[str, str]], name: str, title: str) -> str:
    """What the one row that begins with ``name`` has in the first column that begins with ``title``."""
    (row,) = (row for row in rows if next(iter(row.values())).startswith(name))
    return next(text for column, text in row.items() if column.startswith(title))


@each_driver
@pytest.mark.parametrize("capability", [c for c in Can if c not in NO_ROW], ids=lambda c: c.name)
def test_what_works(driver: Driver, capability: Can):
    said = cell(WORKS, capability.value, f"{driver.title} on a CPU")
    lack = driver.lacks("cpu", "float32").get(capability)
    assert said.startswith(NO) == (lack is not None)
    if lack is not None:
        assert ("refused" in said) == bool(lack.refused)


def test_every_row_is_a_capability():
    named = [c.value for c in Can if c not in NO_ROW]
    assert len(WORKS) == len(named)


def test_what_works_is_tested():
    tests = "".join(file.read_text() for file in Path(__file__).parents[1].rglob("test_*.py"))
    tested = {Can[name] for marks in re.findall(r"needs\((.*?)\)", tests) for name in re.findall(r"Can\.(\w+)", marks)}
    works = {c for c in Can for driver in DRIVERS if c not in driver.lacks("cpu", "float32")}
    assert works <= tested


@each_driver
@pytest.mark.parametrize(("row", "option"), OPTIONS.items())
def test_names_of_options(driver: Driver, row: str, option: str):
    assert f"`{driver.flag(option)}" in cell(SAME, row, driver.title)
