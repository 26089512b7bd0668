"""The sentences that the code can say, read from its sources."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("msa_backend", "kernels", "model", "patches", "tools")
GAP = "…"
"""What stands for a value."""


def sentences() -> set[str]:
    """Every string of the code that is a sentence or part of one, with :data:`GAP` for each value."""
    found = set()
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            found.update(_strings(ast.parse(path.read_text())))
    return found


def _strings(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else GAP for part in node.values)
            yield re.sub(f"{GAP}+", GAP, "".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
