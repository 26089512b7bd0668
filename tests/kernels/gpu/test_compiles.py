"""A guard without a GPU: every kernel, as its wrapper launches it, compiles for each architecture and fits on it."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from ..implementations import INTERPRETED
from . import launches
from .resources import GPUS, Compiled, compile_only, line

pytestmark = pytest.mark.skipif(INTERPRETED, reason="compiles nothing under the interpreter")

SPILLED_BYTES = 64
"""Of a thread: a few values parked outside the loop cost nothing; a tile that does not fit costs hundreds."""
LARGE = {"msa_score": "MANY_ROWS", "msa_query_outer": "BLOCK_M", "msa_kv_outer": "ITEM_TOKENS"}
"""Kernels with tiles of 64 rows and more, and the constant that is at least 64 where they are; of the last, always."""


# Of this suite's environments the first compiles all forms of each kernel for each architecture. The others, with a
# Triton of their own, ask whether that takes the kernels at all: no engine runs them there.
ALL_FORMS = find_spec("vllm") is not None


@pytest.fixture(scope="module", params=sorted(GPUS))
def compiled(request: pytest.FixtureRequest) -> list[Compiled]:
    with compile_only(request.param) as launched:
        if ALL_FORMS:
            launches.everything()
            launches.fp8_products()
        else:
            launches.each_once()
    assert not launched.failed, "\n\n".join(launched.failed)
    return launched.compiled


def test_it_fits(compiled: list[Compiled]):
    """A kernel that spills as a rule has a tile too large for the architecture."""
    assert compiled
    unfit = [c for c in compiled if not fits(c) or c.stack > SPILLED_BYTES]
    assert not unfit, "\n".join(line(c) for c in unfit)


def test_large_products_use_the_widest_instructions(compiled: list[Compiled]):
    """On SM90 products of 64 rows and more are warp-group ones; whatever keeps one from that halves its speed."""
    products = [c for c in compiled if c.count("wgmma.mma_async") or c.count("mma.sync")]
    assert products
    if compiled[0].arch == 90:
        large = [c for c in products if c.name in LARGE and (c.constants[LARGE[c.name]] >= 64 or "kv" in c.name)]
        assert {c.name for c in large} == LARGE.keys()
        narrow = [c for c in large if not c.count("wgmma.mma_async")]
        assert not narrow, "\n".join(line(c) for c in narrow)


@pytest.mark.skipif(not ALL_FORMS, reason="compiled with the Triton of vLLM's environment")
def test_once_is_every_kernel(compiled: list[Compiled]):
    with compile_only(compiled[0].arch) as launched:
        launches.each_once()
    assert {c.name for c in launched.compiled} == {c.name for c in compiled}


@pytest.mark.skipif(not ALL_FORMS, reason="compiled with the Triton of vLLM's environment")
@pytest.mark.parametrize("arch", [89, 90])
def test_extremes_compile_and_fit(arch: int):
    """The largest and smallest that the operations take; slow if need be. SM89 has the least shared memory."""
    with compile_only(arch) as launched:
        launches.corners()
    assert not launched.failed, "\n\n".join(launched.failed)
    unfit = [c for c in launched.compiled if not fits(c)]
    assert not unfit, "\n".join(line(c) for c in unfit)


def fits(c: Compiled) -> bool:
    return c.shared <= GPUS[c.arch].shared_per_block and c.blocks_per_sm >= 1
