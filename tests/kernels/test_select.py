"""Block selection against the definition."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from torch import Tensor

from msa_backend.kernels import reference
from msa_backend.kernels.batch import BLOCK_SIZE
from msa_backend.kernels.selection import Selection

from .batches import HALF, TOPK, Case, Row, cases, make_case, selections
from .compare import assert_selection
from .implementations import CPU, Implementation, every_implementation, examples


def selected(ops: Implementation, case: Case, selection: Selection) -> Tensor:
    case = case.to(ops.device)
    return ops.select_blocks(case.index_q, case.caches, case.batch, selection).cpu()


def check(ops: Implementation, case: Case, selection: Selection) -> None:
    assert_selection(case, selected(ops, case, selection), selection)


@every_implementation
@examples(300)
@given(case=cases, selection=selections())
def test_any_batch(ops: Implementation, case: Case, selection: Selection):
    check(ops, case, selection)


@every_implementation
@pytest.mark.parametrize("length", [1, 127, 128, *(TOPK * 128 + n for n in (-1, 0, 1, 129))])
@pytest.mark.parametrize("query_len", [1, 5, 17, None])
def test_lengths_about_topk(ops: Implementation, length: int, query_len: int | None):
    """At the released model's top-k, where selecting begins."""
    query_len = min(query_len or length, length)
    check(ops, make_case([Row.of(query_len, length - query_len)], dtype=HALF), Selection(TOPK))


@pytest.mark.parametrize("query_len", [3, 40])
def test_work_in_pieces(query_len: int, monkeypatch: pytest.MonkeyPatch):
    """However the work is cut: with pieces of one, everything crosses a border."""
    rows = [Row.of(query_len, 500), Row.of(query_len, 1200), Row.of(query_len, 90)]
    case = make_case(rows)
    # The package gives the operation this name, and so hides the module.
    pieces = importlib.import_module("msa_backend.kernels.cpu.select_blocks")
    for size in ("TILE_TOKENS", "TILE_BLOCKS", "BATCH_BLOCKS", "MAX_SCORES"):
        monkeypatch.setattr(pieces, size, 1)
    check(CPU, case, Selection(2))


@every_implementation
def test_forced_blocks_outrank_any_score(ops: Implementation):
    """Even a sequence whose own index keys overflowed gets its forced blocks, and only blocks it sees."""
    case = make_case([Row.of(1, 1000), Row.of(20, 1000)])
    for bad in (torch.inf, -torch.inf, torch.nan):
        broken = case.with_caches(index_k_pages=torch.full_like(case.caches.index_k_pages, bad))
        block_ids = selected(ops, broken, Selection(3, 1, 1))
        assert (block_ids[..., 0] == 0).all() and (block_ids[..., 2] == 7).all()
        assert ((block_ids[..., 1] > 0) & (block_ids[..., 1] < 7)).all()


@every_implementation
@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_index_keys(ops: Implementation, cache_dtype: torch.dtype):
    check(ops, make_case([Row.of(40, 900), Row.of(1, 1200)], dtype=HALF, cache_dtype=cache_dtype), Selection(4))


@every_implementation
@pytest.mark.parametrize("rows", [[Row.of(40, 900), Row.of(1, 1200)], [Row.of(3, 900), Row.of(1, 1200)]], ids=str)
def test_fp8_products(ops: Implementation, rows: list[Row]):
    """Queries and keys both in fp8."""
    case = make_case(rows, dtype=HALF, cache_dtype=torch.float8_e4m3fn)
    check(ops, replace(case, index_q=case.index_q.to(torch.float8_e4m3fn)), Selection(4))


@every_implementation
def test_strided_index_keys(ops: Implementation):
    case = make_case([Row.of(40, 900), Row.of(1, 1200)])
    keys = case.caches.index_k_pages
    wide = torch.full((*keys.shape[:2], 3 * keys.shape[2]), torch.nan)
    check(ops, case.with_caches(index_k_pages=wide.chunk(3, dim=-1)[1].copy_(keys)), Selection(4))


@every_implementation
def test_strided_index_queries(ops: Implementation):
    """A view of a fused projection, or with heads outermost."""
    case = make_case([Row.of(40, 900), Row.of(1, 1200)])
    fused = torch.full((case.index_q.shape[0], 3 * case.index_q.shape[1], case.index_q.shape[2]), torch.nan)
    heads_first = case.index_q.transpose(0, 1).contiguous().transpose(0, 1)
    for index_q in (fused.chunk(3, dim=1)[1].copy_(case.index_q), heads_first):
        check(ops, replace(case, index_q=index_q), Selection(4))


@every_implementation
@pytest.mark.parametrize("query_len", [90, 5])
def test_a_query_sees_its_own_token_and_none_after(ops: Implementation, query_len: int):
    """With no block forced and each key better than the last, but the first of a block worst: its query takes the
    block before, and every other query its own."""
    case = make_case([Row.of(query_len, 765), Row.of(2, 511)], num_kv_heads=1, dtype=torch.float16)
    case.index_q.zero_()[..., 0] = 1.0
    for seq in reference.sequences(case.batch):
        score = (seq.key_positions + 1000.0).where(seq.key_positions % BLOCK_SIZE > 0, 0.0)
        case.caches.index_k_pages[seq.pages, seq.offsets, 0] = score.half()
    check(ops, case, Selection(1, local_blocks=0))


@every_implementation
def test_loose_bounds(ops: Implementation):
    """The bounds of a batch may be those of a recorded graph, far above what its rows have."""
    case = make_case([Row.of(40, 900), Row.of(1, 1200), Row.of(0, 5)])
    loose = replace(case, batch=replace(case.batch, max_query_len=200, max_seq_len=9000))
    assert_selection(case, selected(ops, loose, Selection(4)), Selection(4))


@every_implementation
def test_no_rows(ops: Implementation):
    assert (selected(ops, make_case([], padding_tail=2), Selection(4)) == -1).all()


@every_implementation
def test_no_tokens(ops: Implementation):
    assert selected(ops, make_case([Row.of(0, 300)]), Selection(4)).shape == (2, 0, 4)
