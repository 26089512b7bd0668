"""Installs the newest engine into an environment of its own, runs the suite there and says what broke.

    python tools/canary.py [--engine vllm|sglang] [--folder .venv-canary] [TEST ...]

It asks the package index for the newest release, takes what that requires now in place of the frozen list, and runs the
tests that an engine can break, or those named. The exit status is 1 if something broke, 2 if nothing could be
installed. Needs the standard library alone.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))  # PYTHONSAFEPATH leaves it out
import setup_env  # noqa: E402

TESTS = ("tests/examples", "tests/engines", "tests/{engine}", "tests/patches", "tests/test_attend.py")
NEVER = ("torch", "torchaudio", "torchcodec")
"""Installed apart, or without a build that loads beside a CPU torch: see the heads of envs/."""
CUDA_ALONE = {"vllm": False, "sglang": True}
"""Whether most of what the engine requires is for CUDA, so that only what the frozen list has is taken of it."""


def name_of(requirement: str) -> str:
    """The distribution of a requirement, in the one spelling."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    if found is None:
        raise ValueError(f"{requirement!r} names no distribution")
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def newest(pip: setup_env.Pip, package: str) -> Mapping[str, Any]:
    """The metadata of the newest release of ``package``, without installing it."""
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        options = ["-qq", "--dry-run", "--ignore-installed", "--no-deps", "--report", report.name]
        subprocess.run([pip.python, "-m", "pip", "install", *options, package], check=True)
        (found,) = json.loads(Path(report.name).read_text())["install"]
    return found["metadata"]


def requirements(metadata: Mapping[str, Any], frozen: str, cuda_alone: bool) -> list[str]:
    """What the newest release requires itself, and of the frozen list what nothing of it names, unpinned.

    Args:
        frozen: the text of the engine's list in envs/.
        cuda_alone: whether requirements that the list lacks are left out.
    """
    listed = {name_of(line): line for line in frozen.splitlines() if line and not line.startswith("#")}
    own = [each for each in metadata.get("requires_dist", ()) if "extra ==" not in each]
    own = [each for each in own if name_of(each) not in NEVER]
    if cuda_alone:
        own = [each for each in own if name_of(each) in listed]
    named = {name_of(each) for each in own}
    return sorted(own) + sorted(name for name in listed if name not in named and name not in NEVER)


def torch_of(metadata: Mapping[str, Any]) -> str:
    """The torch that the release pins, else the one that make installs."""
    pins = [re.match(r"torch *\(?==+ *([\d.]+)", each) for each in metadata.get("requires_dist", ())]
    return next((pin[1] for pin in pins if pin), setup_env.TORCH)


def broken(doctor: Mapping[str, Any], results: ElementTree.Element) -> Iterator[str]:
    """A line for each problem that doctor found, and for each test that failed."""
    yield from doctor["problems"]
    for case in results.iter("testcase"):
        for kind in ("failure", "error"):
            if (found := case.find(kind)) is not None:
                said = (found.get("message") or "").strip().splitlines() or ["no message"]
                yield f"{case.get('classname')}::{case.get('name')}: {said[0][:200]}"


def install(pip: setup_env.Pip, engine: str) -> str:
    """Returns what is installed, as ``name version``.

    Raises:
        subprocess.CalledProcessError: pip could not.
    """
    made = setup_env.ENGINES[engine]
    package = made.package.partition("==")[0]
    metadata = newest(pip, package)
    setup_env.TORCH = torch_of(metadata)
    frozen = (ROOT / made.requirements).read_text()
    wanted = requirements(metadata, frozen, CUDA_ALONE[engine])
    steps = (
        lambda: setup_env.install_torch(pip),
        lambda: pip.install(*wanted),
        lambda: pip.install("--no-deps", f"{package}=={metadata['version']}"),
        lambda: pip.install("-r", "envs/dev.txt"),
        lambda: pip.install("--no-deps", "--no-build-isolation", "-e", "."),
        lambda: setup_env.put_standins_on_path(pip),
    )
    for step in steps:
        if not step():
            raise subprocess.CalledProcessError(1, "pip")
    return f"{package} {metadata['version']}"


def run(pip: setup_env.Pip, tests: Sequence[str]) -> list[str]:
    """What is broken in the environment."""
    doctor = subprocess.run([pip.python, "-m", "msa_backend.cli", "doctor", "--json"], capture_output=True, text=True)
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results.xml")
        command = [str(pip.python), "-m", "pytest", "-q", "--junitxml", str(results), *tests]
        done = subprocess.run(command, cwd=ROOT)
        if not results.exists():
            return [f"pytest ended with status {done.returncode} and no results"]
        return list(broken(json.loads(doctor.stdout), ElementTree.parse(results).getroot()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=setup_env.ENGINES, default="vllm")
    parser.add_argument("--folder", type=Path, help="default: .venv-canary-ENGINE; it is kept")
    parser.add_argument("tests", nargs="*", metavar="TEST", help="default: those that an engine can break")
    options = parser.parse_args()
    folder = options.folder or ROOT / f".venv-canary-{options.engine}"
    pip = setup_env.make_venv(folder.absolute())
    try:
        installed = install(pip, options.engine)
    except subprocess.CalledProcessError:
        print(f"The newest {options.engine} could not be installed; pip's message is above.", file=sys.stderr)
        return 2
    print(f"Installed {installed}", flush=True)
    found = run(pip, options.tests or [test.format(engine=options.engine) for test in TESTS])
    print("\n".join([f"{installed}: {len(found)} broken", *(f"  {line}" for line in found)]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
