"""The site builds without a broken link, and what pages quote is what the code has."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from .sentences import FOLDERS, GAP, ROOT, sentences

DOCS = ROOT / "docs"
OF_ENGINES = {"Unknown attention backend: 'MSA'", "operator torchvision::nms does not exist"}
"""Sentences on the page that are not ours."""
BESIDE_DOCS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
BESIDE_DOCS += [ROOT / folder / "README.md" for folder in ("examples", "research", "docker")]


def tool(name: str) -> ModuleType:
    spec = spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(source: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", site]
    return subprocess.run([*command, "-f", source / "mkdocs.yml"], capture_output=True, text=True, timeout=120)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the site is built from, to break it."""
    for name in ("docs", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    for each in {*(path.name for path in ROOT.iterdir())} - {"docs", "tools", "mkdocs.yml", "site", ".git"}:
        (tmp_path / each).symlink_to(ROOT / each)
    return tmp_path


def test_the_site_builds(tmp_path: Path):
    pytest.importorskip("mkdocs", reason="envs/dev.txt has it")
    done = build(ROOT, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "concepts" / "index.html").exists()


@pytest.mark.parametrize("link", ["nowhere.md", "concepts.md#nowhere", "../kernels/nowhere.py"])
def test_a_broken_link_fails(link: str, checkout: Path, tmp_path: Path):
    pytest.importorskip("mkdocs", reason="envs/dev.txt has it")
    with (checkout / "docs" / "images.md").open("a") as page:
        page.write(f"\n[broken]({link})\n")
    assert build(checkout, tmp_path / "site").returncode == 1


@pytest.mark.parametrize("page", BESIDE_DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_of_pages_beside_the_site(page: Path):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_flag_is_on_the_page_of_flags():
    assert (DOCS / "options.md").read_text() == tool("reference").page(), "run python tools/reference.py"


def test_every_variable_is_on_the_page_of_flags():
    used = set()
    for folder in (folder for folder in FOLDERS if folder != "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            used.update(re.findall(r"\bMSA_[A-Z][A-Z_]*\b", path.read_text()))
    assert used == set(tool("reference").VARIABLES)


def test_every_middleware_and_parser_is_on_the_page_of_flags():
    page = (DOCS / "options.md").read_text()
    named = set()
    for path in (ROOT / "msa_backend" / "vllm").glob("*.py"):
        named.update(re.findall(r"--middleware (msa_backend[\w.]+)", path.read_text()))
    assert len(named) == 3
    assert all(f"`--middleware {name}`" in page for name in named)


def test_sentences_of_the_troubleshooting_page_are_those_of_the_code():
    said = sentences()
    quoted = re.findall(r"^\| `(.+?)` \|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(quoted) > 30
    missing = [sentence for sentence in quoted if sentence not in said | OF_ENGINES]
    assert not missing, "\n".join(missing)


def test_gaps_stand_for_values():
    assert (
        f"{GAP} is {GAP}, but MSA needs {GAP}, one KV-cache page per sparse block; omit it or pass {GAP}" in sentences()
    )


def test_figures_are_those_that_the_tool_draws():
    figures = tool("figures")
    drawn = {path.name: path.read_text() for path in (DOCS / "figures").iterdir()}
    assert drawn == {name: figures.draw(name) for name in figures.FIGURES}, "run python tools/figures.py"
