"""What the patch does to SGLang, and what stands in for its kernels; what every engine has is in tests/engines."""

from __future__ import annotations

import pytest

from ..engines.drivers import DRIVER


@pytest.fixture(scope="module", autouse=True)
def loaded():
    DRIVER.prepare()


def test_disabled_leaves_no_hook():
    code = """
from sglang.srt.plugins import load_plugins
load_plugins()
from msa_backend.patches import sglang_attn_backend_wrapper
print(sglang_attn_backend_wrapper.status())
"""
    assert DRIVER.run(code, MSA_DISABLE="1").strip().splitlines()[-1] == "not applied"
    assert DRIVER.run(code, MSA_DISABLE="0").strip().splitlines()[-1] == "applied"


def test_a_patch_that_no_longer_fits_says_so(monkeypatch: pytest.MonkeyPatch):
    from sglang.srt.layers.attention import attention_registry

    from msa_backend.patches import PatchError, sglang_attn_backend_wrapper

    monkeypatch.setattr(attention_registry, "attn_backend_wrapper", lambda runner: None)
    with pytest.raises(PatchError, match=r"sglang_attn_backend_wrapper does not fit.*SGLang 0\.5\.23"):
        sglang_attn_backend_wrapper.apply(lambda original, *args: None)


def test_every_patch_took():
    from msa_backend.patches import sglang_attn_backend_wrapper

    assert sglang_attn_backend_wrapper.status() == "applied"


def test_the_stand_in_refuses_what_it_has_not():
    import sgl_kernel

    with pytest.raises(NotImplementedError, match="sgl_kernel.no_such_kernel was called, but this is only a stand-in"):
        sgl_kernel.no_such_kernel(1)
