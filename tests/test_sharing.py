"""Ranks that share the scoring of blocks attend as each would alone. Here the ranks are threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from msa_backend import attend as road
from msa_backend.config import MSAError
from msa_backend.kernels.api import LayerCaches, Selection
from msa_backend.sharing import SWITCH, SharedScoring, least_tokens

from .kernels.batches import Case, Row, make_case

HEADS, GROUP = 4, 2
ROWS = [Row.of(1, 2500), Row.of(3, 900), Row.of(40, 1500), Row.of(30, 90)]


class Exchange:
    """What one rank gives, all get."""

    def __init__(self, ranks: int) -> None:
        self.given: list[Tensor] = [torch.empty(0)] * ranks
        self.barrier = threading.Barrier(ranks, timeout=60)
        self.calls = 0

    def of(self, rank: int) -> Callable[[Tensor], Tensor]:
        def gather(x: Tensor) -> Tensor:
            assert x.is_contiguous()
            self.given[rank] = x
            self.barrier.wait()
            found = torch.stack(self.given)
            self.calls += rank == 0
            self.barrier.wait()
            return found

        return gather


def attend(case: Case, heads: slice, selection: Selection, sharing: SharedScoring | None) -> Tensor:
    """One rank's heads of a case."""
    group = slice(heads.start * GROUP, heads.stop * GROUP)
    caches = case.caches
    own = LayerCaches(caches.k_pages[:, heads], caches.v_pages[:, heads], caches.index_k_pages)
    q = case.q[:, group].contiguous()
    out = torch.full_like(q, torch.nan)
    step = road.whole(case.batch.cu_seqlens_q, case.batch.seq_lens, case.batch.block_table, case.q.shape[0], 40, 2501)
    road.attend(q, case.index_q[:, heads], own, step, selection, case.scale, out, sharing)
    return out


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("selection", [Selection(4), Selection(6, 1, 2)], ids=str)
def test_as_each_alone(ranks: int, selection: Selection):
    """Two index heads a rank, one, and one for two ranks."""
    case = make_case(ROWS, num_kv_heads=HEADS, group=GROUP, padding_tail=2)
    exchange, replicas = Exchange(ranks), max(1, ranks // HEADS)

    def run(rank: int) -> tuple[Tensor, Tensor]:
        first = rank * HEADS // ranks
        heads = slice(first, first + max(1, HEADS // ranks))
        sharing = SharedScoring(rank, ranks, replicas, 1, exchange.of(rank))
        return attend(case, heads, selection, sharing), attend(case, heads, selection, None)

    with ThreadPoolExecutor(ranks) as pool:
        for shared, alone in pool.map(run, range(ranks)):
            # Scores of other shapes are summed in another order: what is chosen is the same, but for ties.
            assert torch.equal(shared, alone)
    assert exchange.calls == 2


@pytest.mark.parametrize(("least", "shared"), [(1, True), (2501, True), (2502, False)])
def test_from_how_long_a_context(least: int, shared: bool):
    """The longest that the step may have decides, which all ranks know alike."""
    case = make_case(ROWS, num_kv_heads=HEADS, group=GROUP)
    exchange = Exchange(1)
    attend(case, slice(0, HEADS), Selection(4), SharedScoring(0, 1, 1, least, exchange.of(0)))
    assert exchange.calls == (2 if shared else 0)


def test_nothing_is_shared_where_all_blocks_are_taken():
    sharing = SharedScoring(0, 2, 1, 1, Exchange(2).of(0))
    batch = make_case([Row.of(8, 500)]).batch
    assert not sharing.pays(batch, Selection(4)) and sharing.pays(batch, Selection(3))


@pytest.mark.parametrize(("given", "least"), [(None, None), ("", None), ("0", None), ("65536", 65536)])
def test_the_switch(given: str | None, least: int | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(SWITCH, raising=False)
    if given is not None:
        monkeypatch.setenv(SWITCH, given)
    assert least_tokens() == least


def test_a_switch_that_is_no_number(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(SWITCH, "64K")
    with pytest.raises(MSAError, match="MSA_SHARED_SCORING is '64K', but must be a whole number of tokens"):
        least_tokens()
