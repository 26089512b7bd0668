"""Checks the types of msa_backend in the layout that it is installed in, and of the recipes that use it.

    python tools/typecheck.py

pyproject.toml installs the folders kernels/, model/ and patches/ inside the package msa_backend. mypy knows no such
mapping: in this checkout it finds no `msa_backend.kernels`, and would pass whatever is called there. So links to the
modules are laid out in build/typed as an install lays out the modules, and mypy checks those. What it reports is
printed under the paths of this checkout.
"""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Where [tool.mypy] looks for the package.
TYPED = Path("build/typed")


def installed_modules() -> dict[Path, Path]:
    """The modules of the package: their paths as laid out, and as they are in this checkout, both below ``ROOT``."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    homes = {"": "."} | setuptools["package-dir"]

    def home(package: str) -> Path:
        if package in homes:
            return Path(homes[package])
        parent, _, name = package.rpartition(".")
        return home(parent) / name

    return {
        TYPED.joinpath(*package.split("."), module.name): home(package) / module.name
        for package in setuptools["packages"]
        for module in sorted((ROOT / home(package)).glob("*.py"))
    }


def lay_out(modules: dict[Path, Path]) -> None:
    """Anew, so that no module is left of an earlier time."""
    shutil.rmtree(ROOT / TYPED, ignore_errors=True)
    for link, module in modules.items():
        (ROOT / link).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / link).symlink_to(ROOT / module)


def main() -> int:
    modules = installed_modules()
    lay_out(modules)
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in done.stdout.splitlines():
        path, colon, rest = line.partition(":")
        print(f"{modules.get(Path(path), path)}{colon}{rest}")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
