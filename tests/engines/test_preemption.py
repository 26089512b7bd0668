"""Preemption and eviction change when things are computed, never what."""

from __future__ import annotations

import pytest

from ..prompts import MANY, MANY_TOKENS
from .capabilities import Can, needs
from .conftest import Right
from .drivers import DRIVER


@needs(Can.PREEMPTION)
@pytest.mark.parametrize(("caching", "form"), [(True, "default"), (False, "native")], ids=["caching", "no caching"])
def test_a_cache_too_small_for_the_load(caching: bool, form: str, right: Right, request: pytest.FixtureRequest):
    """Requests are thrown out and resumed, and cached prefixes evicted: 24 pages for a load of 60."""
    model = request.getfixturevalue(form)
    with DRIVER.engine(model, prefix_caching=caching, preempting=True, pages=24, context=2048, chunk=512) as engine:
        rounds = [engine.ask(MANY, MANY_TOKENS) for _ in range(2 if caching else 1)]
        assert engine.preemptions() > 0
    for answers in rounds:
        right(answers, MANY)
