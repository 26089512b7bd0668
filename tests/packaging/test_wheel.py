"""What is in the wheel and in the sdist."""

import re
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

from msa_backend import __version__

# Folder of the checkout: where it is installed.
HOMES = {"msa_backend": "msa_backend"} | {name: f"msa_backend/{name}" for name in ("kernels", "model", "patches")}


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def read(wheel: Path, ending: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith(ending))).decode()


def sources(checkout: Path) -> set[str]:
    """Every module of the checkout, under the name it should be installed by."""
    return {
        (Path(home) / path.relative_to(checkout / folder)).as_posix()
        for folder, home in HOMES.items()
        for path in (checkout / folder).rglob("*.py")
    }


def test_every_module_and_nothing_else_is_in_the_wheel(checkout: Path, names: set[str]) -> None:
    modules = {name for name in names if name.endswith(".py")}
    assert modules == sources(checkout), "a new sub-package has to be listed in [tool.setuptools] packages"


def test_nothing_lands_at_the_top_but_the_package(names: set[str]) -> None:
    assert {name.split("/")[0] for name in names} == {"msa_backend", f"msa_backend-{__version__}.dist-info"}


def test_no_stand_in_is_in_the_wheel(checkout: Path, names: set[str]) -> None:
    """They are for the environment that tests run in; a user's own sgl_kernel must never meet ours."""
    standins = {path.name for path in (checkout / "tests" / "standins").iterdir()}
    assert standins == {"sgl_kernel", "torchvision_on_cpu.py"}
    parts = {part for name in names for part in Path(name).parts}
    assert not parts & {"standins", *standins}
    assert not any(name.endswith(".pth") for name in names)


def test_typing_marker_and_licence_are_in_the_wheel(wheel: Path, names: set[str]) -> None:
    assert "msa_backend/py.typed" in names
    assert "Apache License" in read(wheel, "/licenses/LICENSE")


def test_metadata(wheel: Path) -> None:
    metadata = message_from_string(read(wheel, "/METADATA"))
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == "<3.14,>=3.11"
    # A bare install brings nothing, not even torch.
    assert all("extra ==" in requirement for requirement in metadata.get_all("Requires-Dist", []))
    assert set(metadata.get_all("Provides-Extra", [])) == {"vllm", "cpu", "sglang", "dev"}


def test_entry_points(wheel: Path) -> None:
    found = re.findall(r"^\[(.+)\]\nmsa = (.+)$", read(wheel, "/entry_points.txt"), re.MULTILINE)
    assert ("vllm.general_plugins", "msa_backend.plugin:register_vllm") in found
    assert ("vllm.platform_plugins", "msa_backend.patches.vllm_cpu_version:platform_plugin") in found
    assert ("sglang.srt.plugins", "msa_backend.plugin:register_sglang") in found


def test_the_sdist_has_every_module(checkout: Path, sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    missing = {
        path.relative_to(checkout).as_posix() for folder in HOMES for path in (checkout / folder).rglob("*.py")
    } - names
    assert not missing
    assert {"LICENSE", "pyproject.toml", "README.md", "msa_backend/py.typed"} <= names
