"""The type check of `make typecheck` sees the package as it is installed, and reports what a reader can open."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

# What a check of the folders as they lie here lets pass: a name, a keyword and a module that are not there, each beyond
# a folder that is installed elsewhere than it lies.
MISTAKES = """

def _mistakes() -> None:
    from msa_backend.kernels import api
    from msa_backend.patches import vllm_cpu_version

    api.sparse_attentoin()
    api.select_blocks(tokp=1)
    vllm_cpu_version.PATCH.apply(1)
    import msa_backend.modle
"""
SAYS = {
    "api.sparse_attentoin()": 'Module has no attribute "sparse_attentoin"',
    "api.select_blocks(tokp=1)": 'Unexpected keyword argument "tokp" for "select_blocks"',
    "vllm_cpu_version.PATCH.apply(1)": "Too many arguments",
    "import msa_backend.modle": 'Cannot find implementation or library stub for module named "msa_backend.modle"',
}


def test_mistakes_across_the_mapped_folders_are_found(checkout: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkout, tmp_path / "checkout")
    module = folder / "model" / "experts.py"
    module.write_text(module.read_text() + MISTAKES)

    done = subprocess.run([sys.executable, folder / "tools" / "typecheck.py"], capture_output=True, text=True)

    assert done.returncode == 1, done.stdout + done.stderr
    lines = module.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        if says := SAYS.pop(line.strip(), None):
            assert f"model/experts.py:{number}: error: {says}" in done.stdout
    assert not SAYS
    assert "build/typed" not in done.stdout


def test_recipes_are_checked_too(checkout: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkout, tmp_path / "checkout")
    module = folder / "recipes" / "nano" / "shape.py"
    module.write_text(module.read_text() + "\nTinyShape(hiden=1)\n")
    done = subprocess.run([sys.executable, folder / "tools" / "typecheck.py"], capture_output=True, text=True)
    assert done.returncode == 1
    assert 'Unexpected keyword argument "hiden" for "TinyShape"' in done.stdout


def test_a_module_that_is_gone_is_gone_from_the_layout(checkout: Path, tmp_path: Path) -> None:
    """Else what still imports it would pass."""
    folder = shutil.copytree(checkout, tmp_path / "checkout")
    left = folder / "build" / "typed" / "msa_backend" / "left.py"
    left.parent.mkdir(parents=True)
    left.write_text("")
    script = "import typecheck; typecheck.lay_out(typecheck.installed_modules())"
    subprocess.run([sys.executable, "-c", script], cwd=folder / "tools", env={}, check=True)
    laid_out = {path.relative_to(folder / "build" / "typed").as_posix() for path in left.parent.rglob("*.py")}
    assert "msa_backend/left.py" not in laid_out
    assert {"msa_backend/cli.py", "msa_backend/kernels/api.py", "msa_backend/model/vllm/causal_lm.py"} <= laid_out
