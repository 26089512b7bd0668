"""A guard without a GPU: every kernel, as its wrapper launches it, compiles for each architecture and fits on it."""

from __future__ import annotations

import pytest

from ..implementations import INTERPRETED
from . import launches
from .resources import GPUS, Compiled, compile_only, line

pytestmark = pytest.mark.skipif(INTERPRETED, reason="compiles nothing under the interpreter")

SPILLED_BYTES = 64
"""Of a thread: a few values parked outside the loop cost nothing; a tile that does not fit costs hundreds."""


@pytest.fixture(scope="module", params=sorted(GPUS))
def compiled(request: pytest.FixtureRequest) -> list[Compiled]:
    with compile_only(request.param) as launched:
        launches.everything()
    assert not launched.failed, "\n\n".join(launched.failed)
    return launched.compiled


def test_it_fits(compiled: list[Compiled]):
    assert compiled
    for c in compiled:
        assert c.shared + 1024 <= GPUS[c.arch].shared_per_block + 1024, line(c)
        assert c.blocks_per_sm >= 1, line(c)
        assert c.stack <= SPILLED_BYTES, line(c)


def test_large_products_use_the_widest_instructions(compiled: list[Compiled]):
    """On SM90 products of 64 rows and more are warp-group ones; whatever keeps one from that halves its speed."""
    products = [c for c in compiled if c.count("wgmma.mma_async") or c.count("mma.sync")]
    assert products
    if compiled[0].arch == 90:
        large = [c for c in products if c.name in ("_score_kernel", "_attend_kernel")]
        assert large
        for c in large:
            assert c.count("wgmma.mma_async"), line(c)
