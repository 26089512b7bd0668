"""The engines that are installed here, with the plugin in this process."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from msa_backend.doctor import PLUGIN_ENGINES


def load(module: str) -> None:
    """Do what every process of the engine does about plugins."""
    if find_spec(module) is None:
        pytest.skip(f"{module} is not installed in this environment")
    (engine,) = (engine for engine in PLUGIN_ENGINES if engine.module == module)
    with pytest.MonkeyPatch.context() as environment:
        # Where it is set doctor does not set it, and engines that later tests start keep their logs.
        environment.setenv("VLLM_LOGGING_LEVEL", "WARNING")
        engine.load()


@pytest.fixture(scope="session")
def vllm() -> None:
    load("vllm")


@pytest.fixture(scope="session")
def sglang() -> None:
    load("sglang")
