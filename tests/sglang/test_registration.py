"""The plugin in SGLang's processes: found by all three ways to start one, registered once, gone with MSA_DISABLE=1."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .engines import ENVIRONMENT

FOUND = """
import os
from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.plugins import load_plugins
load_plugins()
print("msa" in ATTENTION_BACKEND_CHOICES, "msa" in ATTENTION_BACKENDS, os.environ.get("SGLANG_EXTERNAL_MODEL_PACKAGE"))
"""


def run(code: str, **environment: str) -> str:
    """Standard output of ``code`` in a new interpreter that has loaded no plugin yet."""
    # Where the plugin has run it leaves the name of its model package to its children.
    inherited = {name: value for name, value in os.environ.items() if name != "SGLANG_EXTERNAL_MODEL_PACKAGE"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=inherited | ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module", autouse=True)
def loaded():
    os.environ.update(ENVIRONMENT)
    from sglang.srt.plugins import load_plugins

    load_plugins()


def test_twice_is_once():
    from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    from msa_backend.plugin import register_sglang

    before = ATTENTION_BACKENDS["msa"]
    register_sglang()
    assert ATTENTION_BACKENDS["msa"] is before
    assert ATTENTION_BACKEND_CHOICES.count("msa") == 1


@pytest.mark.parametrize("disabled", ["0", "1"])
def test_disabled(disabled: str):
    expected = {"0": "True True msa_backend.model.sglang.entry", "1": "False False None"}
    assert run(FOUND, MSA_DISABLE=disabled).strip().splitlines()[-1] == expected[disabled]


def test_disabled_refuses_the_flag(tiny: Path):
    """As a stock SGLang does, which knows no such backend."""
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", tiny, "--attention-backend", "msa"]
    done = subprocess.run(
        command, env=os.environ | ENVIRONMENT | {"MSA_DISABLE": "1"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert "invalid choice: 'msa'" in done.stderr


def test_loading_the_plugin_imports_no_model():
    """Every SGLang process loads plugins, whatever it serves."""
    code = """
import sys
from sglang.srt.plugins import load_plugins
load_plugins()
print([name for name in sys.modules if name.startswith(("msa_backend.model", "msa_backend.kernels.api"))])
"""
    assert run(code).strip().splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("version", "warns"),
    [("0.5.23", False), ("0.5.23.post1", False), ("0.5.22", True), ("0.5.24", True), ("1.0.0", True), ("dev", True)],
)
def test_versions_outside_the_tested_range_are_warned_of(version: str, warns: bool):
    from msa_backend.sglang.registration import warn_outside_tested_versions

    assert warn_outside_tested_versions(version) is warns


def test_an_sglang_without_the_registry_is_named(monkeypatch: pytest.MonkeyPatch):
    """As one far outside the range would be. An exit, because SGLang logs any exception and serves on without us."""
    import sglang

    from msa_backend.plugin import register_sglang

    monkeypatch.setitem(sys.modules, "msa_backend.sglang.registration", None)
    monkeypatch.setattr(sglang, "__version__", "0.4.0")
    with pytest.raises(SystemExit, match=r"SGLang is 0\.4\.0, which lacks .* install one of >=0\.5\.23,<0\.5\.24"):
        register_sglang()


def test_the_stand_in_refuses_what_it_has_not():
    import sgl_kernel

    with pytest.raises(NotImplementedError, match="sgl_kernel.no_such_kernel was called, but this is only a stand-in"):
        sgl_kernel.no_such_kernel(1)
