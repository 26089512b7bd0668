"""Attention over selected blocks against the definition, on the same selection."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

from msa_backend.kernels import cpu, reference
from msa_backend.kernels.cpu import attend

from .batches import HALF, LAYOUTS, TOPK, Case, Row, cases, make_case, selections
from .compare import assert_attention
from .implementations import CPU, GPU, Implementation, every_implementation, examples

MIXED = [Row.of(200), Row.of(40, 900), Row.of(1, 1200), Row.of(4, 1021), Row.of(0, 300), Row(1, 0, 0)]


def select(case: Case, **selection: int) -> Tensor:
    """Right enough to attend with; ``test_select`` is about how right."""
    return cpu.select_blocks(case.index_q, case.index_k_pages, case.batch, **selection)


def attention(ops: Implementation, case: Case, block_ids: Tensor, **scales: float) -> Tensor:
    case = case.to(ops.device)
    out = torch.full_like(case.q, torch.nan)
    result = ops.sparse_attention(
        case.q, case.k_pages, case.v_pages, block_ids.to(ops.device), case.batch, scale=case.scale, out=out, **scales
    )
    assert result is out
    return out.cpu()


def check(ops: Implementation, case: Case, selection: dict[str, Any], **scales: float) -> None:
    block_ids = reference.select_blocks(case.index_q, case.index_k_pages, case.batch, **selection)
    check_on(ops, case, block_ids, **scales)


def check_on(ops: Implementation, case: Case, block_ids: Tensor, **scales: float) -> None:
    """The output for a selection."""
    arguments = {"block_ids": block_ids, "batch": case.batch, "scale": case.scale, **scales}
    expected = reference.sparse_attention(case.q, case.k_pages, case.v_pages, **arguments)
    weighed = None
    if ops is GPU:
        absolute = case.v_pages.float().abs().to(case.v_pages.dtype)
        weighed = reference.sparse_attention(case.q, case.k_pages, absolute, **arguments)
    out = attention(ops, case, block_ids, **scales)
    assert_attention(out, expected, case, weighed)
    assert (out[case.num_live_tokens :] == 0).all()


@every_implementation
@examples(300)
@given(case=cases, selection=selections())
def test_any_batch(ops: Implementation, case: Case, selection: dict[str, int]):
    check(ops, case, selection)


@every_implementation
@pytest.mark.parametrize("length", [1, 127, 128, 129, TOPK * 128 - 1, TOPK * 128, TOPK * 128 + 1])
def test_lengths_about_topk(ops: Implementation, length: int):
    check(ops, make_case([Row.of(length)], num_kv_heads=1, dtype=HALF), {"topk": TOPK})


def test_model_shape():
    """Heads and head dim of the released model; in fp32 to 1e-6, for values of order 1."""
    case = make_case([Row.of(20, 2500), Row.of(1, 3000)], num_kv_heads=4, group=16, dim=128)
    block_ids = select(case, topk=16)
    expected = reference.sparse_attention(case.q, case.k_pages, case.v_pages, block_ids, case.batch, scale=case.scale)
    assert (attention(CPU, case, block_ids) - expected).abs().max() < 1e-6


@every_implementation
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(ops: Implementation, layout: str):
    check(ops, make_case(MIXED, layout=layout), {"topk": 4})


@every_implementation
def test_strided_queries_and_output(ops: Implementation):
    """Queries as a view of a fused projection, or with heads outermost; the output likewise."""
    case = make_case(MIXED, group=4).to(ops.device)
    arguments = {"block_ids": select(case, topk=4), "batch": case.batch, "scale": case.scale}
    expected = ops.sparse_attention(case.q, case.k_pages, case.v_pages, **arguments)
    fused = torch.full((case.q.shape[0], 3 * case.q.shape[1], case.q.shape[2]), torch.nan, device=ops.device)
    heads_first = case.q.transpose(0, 1).contiguous().transpose(0, 1)
    for q in (fused.chunk(3, dim=1)[1].copy_(case.q), heads_first):
        out = torch.empty_strided(q.shape, q.stride(), device=ops.device)
        ops.sparse_attention(q, case.k_pages, case.v_pages, **arguments, out=out)
        assert torch.equal(out, expected)


@every_implementation
@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_cache(ops: Implementation, cache_dtype: torch.dtype):
    case = make_case(MIXED, dtype=HALF, cache_dtype=cache_dtype)
    check(ops, case, {"topk": 4}, k_scale=0.5, v_scale=0.25)


def test_work_in_pieces(monkeypatch: pytest.MonkeyPatch):
    """However the work is cut: with pieces of one, everything crosses a border."""
    case = make_case([Row.of(40, 300), Row.of(1, 500), Row(1, 0, 0)], num_kv_heads=1)
    for size in ("MAX_PARTIALS", "TILE_ROWS", "MAX_LOGITS", "MAX_TILES"):
        monkeypatch.setattr(attend, size, 1)
    check(CPU, case, {"topk": 3})


@every_implementation
def test_many_tiles_of_a_block(ops: Implementation):
    """More queries on one block than a tile holds, and a remainder."""
    check(ops, make_case([Row.of(333, 128)], num_kv_heads=1, group=16), {"topk": 8})


@every_implementation
def test_only_old_blocks(ops: Implementation):
    """With nothing forced at the end a query may lose its own block, and attends to what it chose."""
    check(ops, make_case([Row.of(30, 700), Row.of(1, 900)]), {"topk": 1, "init_blocks": 1, "local_blocks": 0})


@every_implementation
def test_large_logits(ops: Implementation):
    """Each block's softmax is relative to its own largest logit: merging them neither overflows nor loses one."""
    case = make_case([Row.of(20, 600)])
    case.q.mul_(100)
    block_ids = reference.select_blocks(case.index_q, case.index_k_pages, case.batch, topk=4)
    expected = reference.sparse_attention(case.q, case.k_pages, case.v_pages, block_ids, case.batch, scale=case.scale)
    # Logits near 1000 are rounded to 1000 * 2**-24 = 6e-5 and more, and the output moves by as much.
    assert (attention(ops, case, block_ids) - expected).abs().max() < 2e-3


@every_implementation
def test_unseen_tokens_of_a_shared_page(ops: Implementation):
    """Two sequences of unequal length on one page: what is alive for the longer is garbage to the shorter."""
    case = make_case([Row.of(1, 49), Row.of(1, 99)])
    case.batch.block_table[0, 0] = case.batch.block_table[1, 0]
    case.v_pages[case.batch.block_table[1, 0], :, 60:100] = torch.nan
    block_ids = select(case, topk=1)
    assert attention(ops, case, block_ids)[0].isfinite().all()


@every_implementation
@pytest.mark.parametrize("query_len", [1, TOPK * 128])
def test_dense_while_all_blocks_fit(ops: Implementation, query_len: int):
    """At or below topk * 128 tokens nothing is left out."""
    case = make_case([Row.of(query_len, TOPK * 128 - query_len)], num_kv_heads=1)
    block_ids = select(case, topk=TOPK)
    dense = reference.dense_attention(case.q, case.k_pages, case.v_pages, case.batch, scale=case.scale)
    assert_attention(attention(ops, case, block_ids), dense, case)


@every_implementation
def test_selection_matters(ops: Implementation):
    """Guards the tests above: another selection gives another output, far outside the tolerance."""
    case = make_case([Row.of(1, 2000)])
    best = select(case, topk=4)
    newest = select(case, topk=4, local_blocks=4)
    assert (attention(ops, case, best) - attention(ops, case, newest)).abs().max() > 0.01


@every_implementation
def test_loose_bounds(ops: Implementation):
    """The bounds of a batch may be those of a recorded graph, far above what its rows have."""
    case = make_case(MIXED, padding_tail=3)
    check(ops, replace(case, batch=replace(case.batch, max_query_len=400, max_seq_len=9000)), {"topk": 4})


@every_implementation
@pytest.mark.parametrize("out_dtype", [torch.float32, HALF])
def test_output_of_any_dtype(ops: Implementation, out_dtype: torch.dtype):
    case = make_case(MIXED, dtype=torch.float16).to(ops.device)
    block_ids = select(case, topk=4)
    out = torch.full_like(case.q, torch.nan, dtype=out_dtype)
    arguments = {"batch": case.batch, "scale": case.scale}
    ops.sparse_attention(case.q, case.k_pages, case.v_pages, block_ids, **arguments, out=out)
    expected = ops.sparse_attention(case.q, case.k_pages, case.v_pages, block_ids, **arguments)
    assert torch.allclose(out.float(), expected.float(), atol=1e-3, rtol=2**-7)


@every_implementation
@pytest.mark.parametrize("rows", [[Row(17, 0, 0), Row(3, 0, 0)], [Row(1, 0, 0), Row(1, -1, 0)]], ids=["long", "short"])
def test_padding_alone(ops: Implementation, rows: list[Row]):
    """Whatever page a padding row's table names, and there is nothing but NaN and Inf in this cache."""
    case = make_case(rows, padding_tail=2)
    assert (attention(ops, case, select(case, topk=4)) == 0).all()


@every_implementation
def test_no_rows(ops: Implementation):
    case = make_case([], padding_tail=2)
    block_ids = torch.full((2, 2, 4), -1, dtype=torch.int32)
    assert (attention(ops, case, block_ids) == 0).all()


@every_implementation
def test_no_tokens(ops: Implementation):
    case = make_case([Row.of(0, 300)])
    assert attention(ops, case, torch.empty(2, 0, 4, dtype=torch.int32)).shape == case.q.shape
