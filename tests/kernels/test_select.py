"""Block selection against the definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from msa_backend.kernels import api
from msa_backend.kernels.cpu import select

from .batches import Case, Row, cases, make_case, selections
from .compare import assert_selection


@settings(max_examples=300)
@given(case=cases, selection=selections())
def test_any_batch(case: Case, selection: dict[str, int]):
    block_ids = api.select_blocks(case.index_q, case.index_k_pages, case.batch, **selection)
    assert_selection(case, block_ids, **selection)


@pytest.mark.parametrize("length", [1, 127, 128, 129, 2047, 2048, 2049, 2177])
@pytest.mark.parametrize("query_len", [1, 5, 17, None])
def test_lengths_about_topk(length: int, query_len: int | None):
    """At the released model's top-k, where selecting begins: 16 blocks are 2048 tokens."""
    query_len = min(query_len or length, length)
    case = make_case([Row.of(query_len, length - query_len)], dtype=torch.bfloat16)
    assert_selection(case, api.select_blocks(case.index_q, case.index_k_pages, case.batch, topk=16), topk=16)


@pytest.mark.parametrize("query_len", [3, 40])
def test_work_in_pieces(query_len: int, monkeypatch: pytest.MonkeyPatch):
    """However the work is cut: with pieces of one, everything crosses a border."""
    rows = [Row.of(query_len, 500), Row.of(query_len, 1200), Row.of(query_len, 90)]
    case = make_case(rows)
    for size in ("TILE_TOKENS", "TILE_BLOCKS", "BATCH_BLOCKS", "MAX_SCORES"):
        monkeypatch.setattr(select, size, 1)
    assert_selection(case, api.select_blocks(case.index_q, case.index_k_pages, case.batch, topk=2), topk=2)


def test_forced_blocks_outrank_any_score():
    """Even a sequence whose own index keys overflowed gets its forced blocks, and only blocks it sees."""
    case = make_case([Row.of(1, 1000), Row.of(20, 1000)])
    for bad in (torch.inf, -torch.inf, torch.nan):
        index_k_pages = torch.full_like(case.index_k_pages, bad)
        block_ids = api.select_blocks(case.index_q, index_k_pages, case.batch, topk=3, init_blocks=1, local_blocks=1)
        assert (block_ids[..., 0] == 0).all() and (block_ids[..., 2] == 7).all()
        assert ((block_ids[..., 1] > 0) & (block_ids[..., 1] < 7)).all()


@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_index_keys(cache_dtype: torch.dtype):
    case = make_case([Row.of(40, 900), Row.of(1, 1200)], dtype=torch.bfloat16, cache_dtype=cache_dtype)
    assert_selection(case, api.select_blocks(case.index_q, case.index_k_pages, case.batch, topk=4), topk=4)


def test_strided_index_keys():
    case = make_case([Row.of(40, 900), Row.of(1, 1200)])
    wide = torch.full((*case.index_k_pages.shape[:2], 3 * case.index_k_pages.shape[2]), torch.nan)
    strided = wide.chunk(3, dim=-1)[1].copy_(case.index_k_pages)
    block_ids = api.select_blocks(case.index_q, strided, case.batch, topk=4)
    assert_selection(case, block_ids, topk=4)


def test_no_rows():
    case = make_case([], padding_tail=2)
    assert (api.select_blocks(case.index_q, case.index_k_pages, case.batch, topk=4) == -1).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda():
    case = make_case([Row.of(300, 1000), Row.of(1, 1200), Row.of(3, 2000), Row(1, 0, 0)], dtype=torch.bfloat16)
    there = case.to("cuda")
    block_ids = api.select_blocks(there.index_q, there.index_k_pages, there.batch, topk=4)
    assert_selection(case, block_ids.cpu(), topk=4)
