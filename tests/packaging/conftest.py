"""Builds of this checkout, and throwaway environments to install them in. Nothing is downloaded."""

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = (
    *("pyproject.toml", "README.md", "LICENSE"),
    *("msa_backend", "kernels", "model", "patches", "recipes", "tests", "tools"),
)


def clean_environment() -> dict[str, str]:
    """Without what would let a test see this checkout, or see it otherwise than a user does."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "MSA_DISABLE", "VLLM_PLUGINS", "SGLANG_PLUGINS") and not name.startswith("COV_")
    }


@dataclass(frozen=True)
class Environment:
    """An environment with msa-backend and nothing else: no engine, no torch, not even pip."""

    folder: Path

    @property
    def site_packages(self) -> Path:
        return next(self.folder.glob("lib/python*/site-packages"))

    def run(self, program: str, *arguments: str, cwd: Path | None = None, **extra: str) -> str:
        done = subprocess.run(
            [self.folder / "bin" / program, *arguments],
            cwd=cwd or self.folder,
            env={**clean_environment(), **extra},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to build from: a build in place would leave build/ behind, and pick up what an older one left there."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(source, copy / name)
    return copy


Build = Callable[[str, Path], Path]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Calls a hook of the build backend, as pip does, with the setuptools that is installed here."""

    def call(hook: str, source: Path) -> Path:
        out = tmp_path_factory.mktemp(hook)
        script = f"import sys; from setuptools import build_meta; print(build_meta.{hook}(sys.argv[1]))"
        done = subprocess.run(
            [sys.executable, "-c", script, out], cwd=source, env=clean_environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return out / done.stdout.splitlines()[-1]

    return call


@pytest.fixture(scope="session")
def sdist(build: Build, checkout: Path) -> Path:
    return build("build_sdist", checkout)


@pytest.fixture(scope="session")
def wheel(build: Build, checkout: Path) -> Path:
    return build("build_wheel", checkout)


@pytest.fixture(scope="session", params=["wheel", "sdist", "editable"])
def installed(
    request: pytest.FixtureRequest, build: Build, checkout: Path, tmp_path_factory: pytest.TempPathFactory
) -> Environment:
    """msa-backend installed in each of the three ways."""
    if request.param == "wheel":
        archive = request.getfixturevalue("wheel")
    elif request.param == "sdist":
        unpacked = tmp_path_factory.mktemp("sdist")
        shutil.unpack_archive(request.getfixturevalue("sdist"), unpacked, filter="data")
        archive = build("build_wheel", next(unpacked.iterdir()))
    else:
        archive = build("build_editable", checkout)
    folder = tmp_path_factory.mktemp(f"venv-{request.param}")
    venv.create(folder, symlinks=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", folder, "install", "-qq", "--no-index", "--no-deps", archive],
        env=clean_environment(),
        check=True,
    )
    return Environment(folder)
