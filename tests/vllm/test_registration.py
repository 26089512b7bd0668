"""The plugin in vLLM's processes: registered once, usable after a spawn, gone with MSA_DISABLE=1."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def run(code: str, **environment: str) -> str:
    """Standard output of ``code`` in a new interpreter that has loaded no plugin yet."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"VLLM_LOGGING_LEVEL": "WARNING"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module", autouse=True)
def loaded():
    from vllm.plugins import load_general_plugins

    load_general_plugins()


def test_twice_is_once():
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from msa_backend.plugin import register_vllm

    before = AttentionBackendEnum["MSA"]
    register_vllm()
    assert AttentionBackendEnum["MSA"] is before
    assert before.get_class().get_name() == "MSA"


def test_disabled():
    code = """
from vllm.plugins import load_general_plugins
from vllm.model_executor.models import ModelRegistry
from vllm.v1.attention.backends.registry import AttentionBackendEnum
load_general_plugins()
print("MSA" in AttentionBackendEnum.__members__)
print(ModelRegistry.models["MiniMaxM3SparseForCausalLM"].module_name)
"""
    assert run(code, MSA_DISABLE="1").split() == ["False", "vllm.models.minimax_m3"]
    assert run(code, MSA_DISABLE="0").split() == ["True", "msa_backend.model.vllm.causal_lm"]


def test_loading_the_plugin_imports_no_model():
    """Every vLLM process loads plugins, whatever it serves."""
    code = """
import sys
from vllm.plugins import load_general_plugins
load_general_plugins()
print([name for name in sys.modules if name.startswith(("msa_backend.model", "msa_backend.kernels.api"))])
"""
    assert run(code).strip() == "[]"


@pytest.mark.parametrize(
    ("version", "warns"),
    [("0.32.0", False), ("0.33.1", False), ("0.33.0rc1+cu130", False), ("0.31.9", True), ("0.34.0", True),
     ("1.0.0", True), ("dev", True)],
)  # fmt: skip
def test_versions_outside_the_tested_range_are_warned_of(version: str, warns: bool):
    from msa_backend.vllm.registration import warn_outside_tested_versions

    assert warn_outside_tested_versions(version) is warns


def test_a_vllm_without_the_registry_is_named(monkeypatch: pytest.MonkeyPatch):
    """As one far outside the range would be: importing a module that is gone raises ImportError."""
    import vllm

    from msa_backend.config import MSAError
    from msa_backend.plugin import register_vllm

    monkeypatch.setitem(sys.modules, "msa_backend.vllm.registration", None)
    monkeypatch.setattr(vllm, "__version__", "0.19.0")
    with pytest.raises(MSAError, match=r"vLLM is 0\.19\.0, which lacks .* install one of >=0\.32,<0\.34"):
        register_vllm()
