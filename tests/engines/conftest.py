"""What one engine lacks is skipped, with the reason, before anything is started for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from ..compare import Answer, PromptIds, assert_as_close_in_bf16, assert_true
from ..device import DEVICE, DTYPE
from .drivers import DRIVER

Right = Callable[[Sequence[Answer], Sequence[PromptIds]], None]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    lacks = DRIVER.lacks(DEVICE, DTYPE)
    for item in items:
        for marker in item.iter_markers("needs"):
            for capability in marker.args:
                if lack := lacks.get(capability):
                    reason = f"{DRIVER.title} lacks {capability.value}: {lack.why}"
                    item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True, scope="session")
def loaded() -> None:
    """The plugin in this process, which needs some variables before it sees the engine."""
    DRIVER.prepare()


@pytest.fixture(scope="session")
def right(tiny: Path, truth: Any) -> Right:
    """Fails unless answers are those of ``transformers``: each in fp32, by the noise of all in a shorter dtype."""

    def check(answers: Sequence[Answer], prompts: Sequence[PromptIds]) -> None:
        assert len(answers) == len(prompts)
        if DTYPE == "float32":
            for answer, prompt in zip(answers, prompts, strict=True):
                assert_true(answer, prompt, truth)
        else:
            assert_as_close_in_bf16(answers, prompts, tiny)

    return check
