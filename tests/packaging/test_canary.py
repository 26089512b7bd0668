"""tools/canary.py: what it installs of a newer release, and what it calls broken. It installs nothing here."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]
FROZEN = "# a head\nNumPy==2.3.5\ntorchvision==0.28.0\ntransitive_thing==1.0\n"
METADATA: dict[str, Any] = {
    "requires_dist": ["numpy>=2.4", "torch==2.15.0", "torchaudio", "new-thing<3", "pytest; extra == 'test'"]
}


@pytest.fixture(scope="module")
def canary() -> ModuleType:
    spec = spec_from_file_location("canary", ROOT / "tools" / "canary.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    before = sys.path[:]
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def test_the_release_says_what_it_needs_and_the_list_what_it_does_not_name(canary: ModuleType):
    wanted = canary.requirements(METADATA, FROZEN, cuda_alone=False)
    assert wanted == ["new-thing<3", "numpy>=2.4", "torchvision", "transitive-thing"]
    assert canary.requirements(METADATA, FROZEN, cuda_alone=True) == ["numpy>=2.4", "torchvision", "transitive-thing"]


def test_the_torch_it_pins(canary: ModuleType):
    assert canary.torch_of(METADATA) == canary.torch_of({"requires_dist": ["torch (==2.15.0)"]}) == "2.15.0"
    assert canary.torch_of({"requires_dist": ["torch>=2"]}) == canary.setup_env.TORCH


def test_what_is_broken(canary: ModuleType):
    results = ElementTree.fromstring(
        '<testsuites><testsuite><testcase classname="tests.a" name="good"/>'
        '<testcase classname="tests.a" name="bad"><failure message="gone&#10;more">trace</failure></testcase>'
        '<testcase classname="tests.b" name="worse"><error message="no fixture"/></testcase>'
        '<testcase classname="tests.b" name="left"><skipped message="lacks it"/></testcase></testsuite></testsuites>'
    )
    found = list(canary.broken({"problems": ["The patch x did not take: changed"]}, results))
    assert found == ["The patch x did not take: changed", "tests.a::bad: gone", "tests.b::worse: no fixture"]


def test_its_tests_exist(canary: ModuleType):
    for engine in canary.setup_env.ENGINES:
        assert all((ROOT / test.format(engine=engine)).exists() for test in canary.TESTS)
