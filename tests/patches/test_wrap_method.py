"""A method that is wrapped calls what was put around it, once, with what was there before."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from msa_backend.patches import APPLIED, NOT_APPLIED, PatchError, status_of_method, wrap_method
from msa_backend.patches.registry import PATCHES


class Engine:
    def step(self, tokens: int) -> int:
        return tokens


@pytest.fixture
def engine() -> type[Engine]:
    return type("Engine", (), {"step": Engine.step})


def one_more(original: Callable[..., int], self: Engine, tokens: int) -> int:
    return original(self, tokens) + 1


def test_once_however_often(engine: type[Engine]):
    """Plugins are loaded in every process of an engine, and more than once in some."""
    assert status_of_method(engine, "step") == NOT_APPLIED
    for _ in range(2):
        wrap_method(PATCHES[0], engine, "step", ["self", "tokens"], one_more)
    assert engine().step(3) == 4 and status_of_method(engine, "step") == APPLIED


@pytest.mark.parametrize(("name", "parameters"), [("step", ["self"]), ("stop", ["self"])])
def test_another_shape_is_refused(engine: type[Engine], name: str, parameters: list[str]):
    with pytest.raises(PatchError, match=rf"Engine\.{name}\(self\) is gone or changed"):
        wrap_method(PATCHES[0], engine, name, parameters, one_more)
    assert engine().step(3) == 3
