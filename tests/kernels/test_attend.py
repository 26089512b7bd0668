"""Attention over selected blocks against the definition, on the same selection."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from torch import Tensor

from msa_backend.kernels import cpu, reference
from msa_backend.kernels.selection import Selection

from .batches import HALF, LAYOUTS, TOPK, Case, Row, cases, make_case, selections
from .compare import assert_attention
from .implementations import CPU, GPU, Implementation, every_implementation, examples

MIXED = [Row.of(200), Row.of(40, 900), Row.of(1, 1200), Row.of(4, 1021), Row.of(0, 300), Row(1, 0, 0)]


def select(case: Case, topk: int, init_blocks: int = 0, local_blocks: int = 1) -> Tensor:
    """Right enough to attend with; ``test_select`` is about how right."""
    return cpu.select_blocks(case.index_q, case.caches, case.batch, Selection(topk, init_blocks, local_blocks))


def attention(ops: Implementation, case: Case, block_ids: Tensor) -> Tensor:
    case = case.to(ops.device)
    out = torch.full_like(case.q, torch.nan)
    result = ops.sparse_attention(case.q, case.caches, block_ids.to(ops.device), case.batch, case.scale, out)
    assert result is out
    return out.cpu()


def check(ops: Implementation, case: Case, selection: Selection) -> None:
    block_ids = reference.select_blocks(case.index_q, case.caches, case.batch, selection)
    check_output(ops, case, block_ids, attention(ops, case, block_ids))


def check_output(ops: Implementation, case: Case, block_ids: Tensor, out: Tensor) -> None:
    """The output for a selection."""
    expected = reference.sparse_attention(case.q, case.caches, block_ids, case.batch, case.scale)
    weighed = None
    if ops is GPU:
        v_pages = case.caches.v_pages
        absolute = replace(case.caches, v_pages=v_pages.float().abs().to(v_pages.dtype))
        weighed = reference.sparse_attention(case.q, absolute, block_ids, case.batch, case.scale)
    assert_attention(out, expected, case, weighed)
    assert (out[case.num_live_tokens :] == 0).all()


@every_implementation
@examples(300)
@given(case=cases, selection=selections())
def test_any_batch(ops: Implementation, case: Case, selection: Selection):
    check(ops, case, selection)


@every_implementation
@examples(100)
@given(case=cases, selection=selections())
def test_selected_and_attended_in_one(ops: Implementation, case: Case, selection: Selection):
    """Twice by one batch, as the layers of a step do it: the second finds nothing that the first has left behind."""
    on_device = case.to(ops.device)
    arguments = on_device.q, on_device.index_q, on_device.caches, on_device.batch, selection, case.scale
    first, second = (ops.attend(*arguments, torch.full_like(on_device.q, torch.nan)).cpu() for _ in range(2))
    assert torch.equal(first, second)
    # Blocks that tie may fall either way, so by this implementation's own selection.
    fresh = case.to(ops.device)
    block_ids = ops.select_blocks(fresh.index_q, fresh.caches, fresh.batch, selection).cpu()
    check_output(ops, case, block_ids, first)


@every_implementation
@pytest.mark.parametrize("length", [1, 127, 128, 129, TOPK * 128 - 1, TOPK * 128, TOPK * 128 + 1])
def test_lengths_about_topk(ops: Implementation, length: int):
    check(ops, make_case([Row.of(length)], num_kv_heads=1, dtype=HALF), Selection(TOPK))


def test_model_shape():
    """Heads and head dim of the released model; in fp32 to 1e-6, for values of order 1."""
    case = make_case([Row.of(20, 2500), Row.of(1, 3000)], num_kv_heads=4, group=16, dim=128)
    block_ids = select(case, topk=16)
    expected = reference.sparse_attention(case.q, case.caches, block_ids, case.batch, case.scale)
    assert (attention(CPU, case, block_ids) - expected).abs().max() < 1e-6


@every_implementation
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(ops: Implementation, layout: str):
    check(ops, make_case(MIXED, layout=layout), Selection(4))


@every_implementation
def test_strided_queries_and_output(ops: Implementation):
    """Queries as a view of a fused projection, or with heads outermost; the output likewise."""
    case = make_case(MIXED, group=4).to(ops.device)
    arguments = case.caches, select(case, topk=4), case.batch, case.scale
    expected = ops.sparse_attention(case.q, *arguments)
    fused = torch.full((case.q.shape[0], 3 * case.q.shape[1], case.q.shape[2]), torch.nan, device=ops.device)
    heads_first = case.q.transpose(0, 1).contiguous().transpose(0, 1)
    for q in (fused.chunk(3, dim=1)[1].copy_(case.q), heads_first):
        out = torch.empty_strided(q.shape, q.stride(), device=ops.device)
        ops.sparse_attention(q, *arguments, out)
        assert torch.equal(out, expected)


@every_implementation
@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_cache(ops: Implementation, cache_dtype: torch.dtype):
    check(ops, make_case(MIXED, dtype=HALF, cache_dtype=cache_dtype, k_scale=0.5, v_scale=0.25), Selection(4))


def test_work_in_pieces(monkeypatch: pytest.MonkeyPatch):
    """However the work is cut: with pieces of one, everything crosses a border."""
    case = make_case([Row.of(40, 300), Row.of(1, 500), Row(1, 0, 0)], num_kv_heads=1)
    # The package gives the operation this name, and so hides the module.
    pieces = importlib.import_module("msa_backend.kernels.cpu.sparse_attention")
    for size in ("MAX_PARTIALS", "TILE_ROWS", "MAX_LOGITS", "MAX_TILES"):
        monkeypatch.setattr(pieces, size, 1)
    check(CPU, case, Selection(3))


@every_implementation
def test_many_tiles_of_a_block(ops: Implementation):
    """More queries on one block than a tile holds, and a remainder."""
    check(ops, make_case([Row.of(333, 128)], num_kv_heads=1, group=16), Selection(8))


@every_implementation
def test_only_old_blocks(ops: Implementation):
    """With nothing forced at the end a query may lose its own block, and attends to what it chose."""
    check(ops, make_case([Row.of(30, 700), Row.of(1, 900)]), Selection(1, 1, 0))


@every_implementation
def test_large_logits(ops: Implementation):
    """Each block's softmax is relative to its own largest logit: merging them neither overflows nor loses one."""
    case = make_case([Row.of(20, 600)])
    case.q.mul_(100)
    block_ids = reference.select_blocks(case.index_q, case.caches, case.batch, Selection(4))
    expected = reference.sparse_attention(case.q, case.caches, block_ids, case.batch, case.scale)
    # Logits near 1000 are rounded to 1000 * 2**-24 = 6e-5 and more, and the output moves by as much.
    assert (attention(ops, case, block_ids) - expected).abs().max() < 2e-3


@every_implementation
def test_unseen_tokens_of_a_shared_page(ops: Implementation):
    """Two sequences of unequal length on one page: what is alive for the longer is garbage to the shorter."""
    case = make_case([Row.of(1, 49), Row.of(1, 99)])
    case.batch.block_table[0, 0] = case.batch.block_table[1, 0]
    case.caches.v_pages[case.batch.block_table[1, 0], :, 60:100] = torch.nan
    block_ids = select(case, topk=1)
    assert attention(ops, case, block_ids)[0].isfinite().all()


@every_implementation
@pytest.mark.parametrize("query_len", [1, TOPK * 128])
def test_dense_while_all_blocks_fit(ops: Implementation, query_len: int):
    """At or below topk * 128 tokens nothing is left out."""
    case = make_case([Row.of(query_len, TOPK * 128 - query_len)], num_kv_heads=1)
    block_ids = select(case, topk=TOPK)
    dense = reference.dense_attention(case.q, case.caches, case.batch, case.scale)
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
    check(ops, replace(case, batch=replace(case.batch, max_query_len=400, max_seq_len=9000)), Selection(4))


@every_implementation
@pytest.mark.parametrize("out_dtype", [torch.float32, HALF])
def test_output_of_any_dtype(ops: Implementation, out_dtype: torch.dtype):
    case = make_case(MIXED, dtype=torch.float16).to(ops.device)
    block_ids = select(case, topk=4)
    out = torch.full_like(case.q, torch.nan, dtype=out_dtype)
    arguments = case.q, case.caches, block_ids, case.batch, case.scale
    ops.sparse_attention(*arguments, out)
    expected = ops.sparse_attention(*arguments)
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
