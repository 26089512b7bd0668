"""What the patches do to vLLM; what every engine's registration has is in tests/engines."""

from __future__ import annotations

import pickle

import pytest

from ..engines.drivers import DRIVER


@pytest.fixture(scope="module", autouse=True)
def loaded():
    DRIVER.prepare()


def test_the_name_survives_a_spawn():
    """A spawned engine process unpickles the options before it loads plugins."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    pickled = pickle.dumps({"backend": AttentionBackendEnum["MSA"]})
    assert DRIVER.run(f"import pickle; print(pickle.loads({pickled!r})['backend'].name)").strip() == "MSA"


def test_a_patch_that_no_longer_fits_says_so(monkeypatch: pytest.MonkeyPatch):
    from vllm.config import VllmConfig

    from msa_backend.patches import PatchError, vllm_refuse_other_models

    monkeypatch.setattr(VllmConfig, "try_verify_and_update_config", lambda self, more: None)
    with pytest.raises(PatchError, match=r"vllm_refuse_other_models does not fit.*vLLM 0\.32, vLLM 0\.33"):
        vllm_refuse_other_models.apply("MSA", frozenset())


def test_every_patch_took():
    from msa_backend.patches import vllm_backend_name, vllm_refuse_other_models

    assert [patch.status() for patch in (vllm_backend_name, vllm_refuse_other_models)] == ["applied"] * 2
