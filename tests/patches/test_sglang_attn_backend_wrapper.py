"""patches/sglang_attn_backend_wrapper.py: whether SGLang's own wrapping is hooked, wherever it is called from."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from msa_backend.patches.sglang_attn_backend_wrapper import PATCH

pytestmark = pytest.mark.usefixtures("sglang")


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``code`` in a new interpreter that has loaded no plugin yet."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(("disabled", "status"), [("1", "not applied"), ("0", "applied")])
def test_disabled_leaves_no_hook(disabled: str, status: str) -> None:
    code = """
from sglang.srt.plugins import load_plugins
load_plugins()
from msa_backend.patches import sglang_attn_backend_wrapper
print(sglang_attn_backend_wrapper.PATCH.status())
"""
    done = run(code, MSA_DISABLE=disabled)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == status


def test_a_hook_around_ours_is_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.layers.attention import attention_registry
    from sglang.srt.model_executor.model_runner_components import attention_backend_setup
    from sglang.srt.plugins.hook_registry import HookType, _wrap_fn

    outer = _wrap_fn(attention_registry.attn_backend_wrapper, lambda original, *args: original(*args), HookType.AROUND)
    for module in (attention_registry, attention_backend_setup):
        monkeypatch.setattr(module, "attn_backend_wrapper", outer)
    assert PATCH.status() == "applied"


def test_a_caller_that_kept_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.model_executor.model_runner_components import attention_backend_setup

    monkeypatch.setattr(
        attention_backend_setup, "attn_backend_wrapper", attention_backend_setup.attn_backend_wrapper.__wrapped__
    )
    assert PATCH.status() == "not applied"


def test_a_target_that_changed_shape_ends_the_process() -> None:
    """SGLang lets no exception of a plugin through."""
    code = """
from sglang.srt.layers.attention import attention_registry
attention_registry.attn_backend_wrapper = lambda runner, full_attn_backend, more: None
from sglang.srt.plugins import load_plugins
load_plugins()
print("went on")
"""
    done = run(code)
    assert done.returncode != 0
    assert "went on" not in done.stdout
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("msa-backend: the patch sglang_attn_backend_wrapper does not fit this engine")
    assert "MSA_DISABLE=1" in last
