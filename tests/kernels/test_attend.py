"""Attention over selected blocks against the definition, on the same selection."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from msa_backend.kernels import api, reference
from msa_backend.kernels.cpu import attend

from .batches import LAYOUTS, Case, Row, cases, make_case, selections
from .compare import assert_attention

MIXED = [Row.of(200), Row.of(40, 900), Row.of(1, 1200), Row.of(4, 1021), Row.of(0, 300), Row(1, 0, 0)]


def attention(case: Case, block_ids: Tensor, **scales: float) -> Tensor:
    out = torch.full_like(case.q, torch.nan)
    result = api.sparse_attention(
        case.q, case.k_pages, case.v_pages, block_ids, case.batch, scale=case.scale, out=out, **scales
    )
    assert result is out
    return out


def check(case: Case, selection: dict[str, Any], **scales: float) -> None:
    block_ids = reference.select_blocks(case.index_q, case.index_k_pages, case.batch, **selection)
    expected = reference.sparse_attention(
        case.q, case.k_pages, case.v_pages, block_ids, case.batch, scale=case.scale, **scales
    )
    out = attention(case, block_ids, **scales)
    assert_attention(out, expected, case)
    assert (out[case.num_live_tokens :] == 0).all()


@settings(max_examples=300)
@given(case=cases, selection=selections())
def test_any_batch(case: Case, selection: dict[str, int]):
    check(case, selection)


@pytest.mark.parametrize("length", [1, 127, 128, 129, 2047, 2048, 2049])
def test_lengths_about_topk(length: int):
    check(make_case([Row.of(length)], num_kv_heads=1, dtype=torch.bfloat16), {"topk": 16})


def test_model_shape():
    """Heads and head dim of the released model; in fp32 to 1e-6, for values of order 1."""
    case = make_case([Row.of(20, 2500), Row.of(1, 3000)], num_kv_heads=4, group=16, dim=128)
    block_ids = api.select_blocks(case.index_q, case.index_k_pages, case.batch, topk=16)
    expected = reference.sparse_attention(case.q, case.k_pages, case.v_pages, block_ids, case.batch, scale=case.scale)
    assert (attention(case, block_ids) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str):
    check(make_case(MIXED, layout=layout), {"topk": 4})


def test_strided_queries_and_output():
    """Queries as a view of a fused projection, or with heads outermost; the output likewise."""
    case = make_case(MIXED, group=4)
    block_ids = api.select_blocks(case.index_q, case.index_k_pages, case.batch, topk=4)
    expected = attention(case, block_ids)
    fused = torch.full((case.q.shape[0], 3 * case.q.shape[1], case.q.shape[2]), torch.nan)
    heads_first = case.q.transpose(0, 1).contiguous().transpose(0, 1)
    for q in (fused.chunk(3, dim=1)[1].copy_(case.q), heads_first):
        out = torch.empty_strided(q.shape, q.stride())
        pages = case.k_pages, case.v_pages
        api.sparse_attention(q, *pages, block_ids, case.batch, scale=case.scale, out=out)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_cache(cache_dtype: torch.dtype):
    case = make_case(MIXED, dtype=torch.bfloat16, cache_dtype=cache_dtype)
    check(case, {"topk": 4}, k_scale=0.5, v_scale=0.25)


def test_work_in_pieces(monkeypatch: pytest.MonkeyPatch):
    """However the work is cut: with pieces of one, everything crosses a border."""
    case = make_case([Row.of(40, 300), Row.of(1, 500), Row(1, 0, 0)], num_kv_heads=1)
    for size in ("MAX_PARTIALS", "TILE_ROWS", "MAX_LOGITS", "MAX_TILES"):
        monkeypatch.setattr(attend, size, 1)
    check(case, {"topk": 3})


def test_many_tiles_of_a_block():
    """More queries on one block than a tile holds, and a remainder."""
    check(make_case([Row.of(333, 128)], num_kv_heads=1, group=16), {"topk": 8})


def test_only_old_blocks():
    """With nothing forced at the end a query may lose its own block, and attends to what it chose."""
    check(make_case([Row.of(30, 700), Row.of(1, 900)]), {"topk": 1, "init_blocks": 1, "local_blocks": 0})


def test_large_logits():
    """Each block's softmax is relative to its own largest logit: merging them neither overflows nor loses one."""
    case = make_case([Row.of(20, 600)])
    case.q.mul_(100)
    block_ids = reference.select_blocks(case.index_q, case.index_k_pages, case.batch, topk=4)
    expected = reference.sparse_attention(case.q, case.k_pages, case.v_pages, block_ids, case.batch, scale=case.scale)
    # Logits near 1000 are rounded to 1000 * 2**-24 = 6e-5 and more, and the output moves by as much.
    assert (attention(case, block_ids) - expected).abs().max() < 2e-3


def test_unseen_tokens_of_a_shared_page():
    """Two sequences of unequal length on one page: what is alive for the longer is garbage to the shorter."""
    case = make_case([Row.of(1, 49), Row.of(1, 99)])
    case.batch.block_table[0, 0] = case.batch.block_table[1, 0]
    case.v_pages[case.batch.block_table[1, 0], :, 60:100] = torch.nan
    block_ids = api.select_blocks(case.index_q, case.index_k_pages, case.batch, topk=1)
    assert attention(case, block_ids)[0].isfinite().all()


@pytest.mark.parametrize("query_len", [1, 2048])
def test_dense_while_all_blocks_fit(query_len: int):
    """At or below topk * 128 tokens nothing is left out."""
    case = make_case([Row.of(query_len, 2048 - query_len)], num_kv_heads=1)
    block_ids = api.select_blocks(case.index_q, case.index_k_pages, case.batch, topk=16)
    dense = reference.dense_attention(case.q, case.k_pages, case.v_pages, case.batch, scale=case.scale)
    assert_attention(attention(case, block_ids), dense, case)


def test_selection_matters():
    """Guards the tests above: another selection gives another output, far outside the tolerance."""
    case = make_case([Row.of(1, 2000)])
    best = api.select_blocks(case.index_q, case.index_k_pages, case.batch, topk=4)
    newest = api.select_blocks(case.index_q, case.index_k_pages, case.batch, topk=4, local_blocks=4)
    assert (attention(case, best) - attention(case, newest)).abs().max() > 0.01


def test_no_rows():
    case = make_case([], padding_tail=2)
    block_ids = torch.full((2, 2, 4), -1, dtype=torch.int32)
    assert (attention(case, block_ids) == 0).all()


def test_no_tokens():
    case = make_case([Row.of(0, 300)])
    assert attention(case, torch.empty(2, 0, 4, dtype=torch.int32)).shape == case.q.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda():
    case = make_case(MIXED, group=8, dtype=torch.bfloat16, padding_tail=3)
    block_ids = reference.select_blocks(case.index_q, case.index_k_pages, case.batch, topk=4)
    expected = reference.sparse_attention(case.q, case.k_pages, case.v_pages, block_ids, case.batch, scale=case.scale)
    assert_attention(attention(case.to("cuda"), block_ids.cuda()).cpu(), expected, case)
