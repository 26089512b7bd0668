"""The plugin in the processes of an engine: registered once, gone with MSA_DISABLE=1, loud about other versions."""

from __future__ import annotations

import sys
from importlib import import_module

import pytest

from msa_backend import plugin

from .drivers import DRIVER


def test_twice_is_once():
    before = DRIVER.registration()
    getattr(plugin, f"register_{DRIVER.package}")()
    assert DRIVER.registration() == before


def test_registered_without_importing_a_model():
    """Every process of an engine loads plugins, whatever it serves."""
    heavy = ("msa_backend.model", "msa_backend.kernels.api")
    code = f"{DRIVER.registered}\nimport sys\nprint([name for name in sys.modules if name.startswith({heavy})])"
    *_, registered, imported = DRIVER.run(code).strip().splitlines()
    assert set(registered.split()) == {"True"}
    assert imported == "[]"


def test_disabled():
    """Nothing is registered, and the flag is refused as by a stock engine, which knows no such backend."""
    code = f"{DRIVER.registered}\nprint('that was all')\n{DRIVER.ask_for_msa}"
    with pytest.raises(RuntimeError) as ended:
        DRIVER.run(code, MSA_DISABLE="1")
    lines = str(ended.value).splitlines()
    assert set(lines[lines.index("that was all") - 1].split()) == {"False"}
    assert DRIVER.unknown_backend in str(ended.value)


@pytest.mark.parametrize(("version", "warns"), DRIVER.versions)
def test_versions_outside_the_tested_range_are_warned_of(version: str, warns: bool):
    registration = import_module(f"msa_backend.{DRIVER.package}.registration")
    assert registration.warn_outside_tested_versions(version) is warns


def test_an_engine_without_the_registry_is_named(monkeypatch: pytest.MonkeyPatch):
    """As one far outside the range would be: importing a module that is gone raises ImportError."""
    version, error, says = DRIVER.unfit
    monkeypatch.setitem(sys.modules, f"msa_backend.{DRIVER.package}.registration", None)
    monkeypatch.setattr(import_module(DRIVER.package), "__version__", version)
    with pytest.raises(error, match=says):
        getattr(plugin, f"register_{DRIVER.package}")()
