"""Blocks that several ranks score in shares are chosen as one rank alone chooses them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from msa_backend.kernels.selection import Selection
from msa_backend.kernels.share import Share

from .batches import HALF, Case, Row, cases, make_case, selections
from .compare import assert_selection
from .implementations import CPU, Implementation, every_implementation, examples


def candidates(ops: Implementation, case: Case, selection: Selection, ranks: int) -> Tensor:
    """``[ranks, 2, num_heads, num_tokens, topk]``: what all ranks would have gathered."""
    case = case.to(ops.device)
    found = [
        ops.select_candidates(case.index_q, case.caches, case.batch, selection, Share(rank, ranks))
        for rank in range(ranks)
    ]
    return torch.stack(found)


def merged(ops: Implementation, case: Case, selection: Selection, ranks: int) -> Tensor:
    found = candidates(ops, case, selection, ranks)
    return ops.merge_candidates(found, case.to(ops.device).batch, selection).cpu()


@every_implementation
@examples(200)
@given(case=cases, selection=selections(), ranks=st.integers(1, 5))
def test_any_batch(ops: Implementation, case: Case, selection: Selection, ranks: int):
    assert_selection(case, merged(ops, case, selection, ranks), selection)


@every_implementation
@pytest.mark.parametrize("rows", [[Row.of(40, 1900), Row.of(1, 1200), Row(2, 0, 0)], [Row.of(1, 2500), Row.of(3, 700)]])
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_the_same_blocks_as_alone(ops: Implementation, rows: list[Row], ranks: int):
    """Of scores that are whole numbers, exact in any order of summing, and different from block to block."""
    case = make_case(rows, dim=32, dtype=torch.float16, padding_tail=2)
    case.index_q.zero_()[..., 0] = 1
    case.caches.index_k_pages.zero_()
    order = torch.randperm(case.caches.num_pages, generator=torch.Generator().manual_seed(ranks))
    case.caches.index_k_pages[:, 0, 0] = order.half()
    for selection in (Selection(4), Selection(5, 1, 2), Selection(1)):
        alone = ops.select_blocks(*of(case, ops), selection).cpu()
        assert torch.equal(merged(ops, case, selection, ranks), alone)


def of(case: Case, ops: Implementation) -> tuple[Tensor, object, object]:
    case = case.to(ops.device)
    return case.index_q, case.caches, case.batch


@every_implementation
def test_candidates_are_of_the_share_alone(ops: Implementation):
    """No forced block, none of another rank's, none twice; fewer than top-k where the share has fewer."""
    case = make_case([Row.of(1, 2500), Row.of(2, 640)], dtype=HALF)
    for rank, (keys, blocks) in enumerate(candidates(ops, case, Selection(4, 1, 1), 3).cpu()):
        assert torch.equal(keys == -(1 << 31), blocks < 0)
        for head in range(2):
            for token, visible in enumerate((20, 6, 6)):
                found = [block for block in blocks[head, token].tolist() if block >= 0]
                free = [block for block in range(1, visible - 1) if block % 3 == rank]
                assert len(found) == len(set(found)) == min(2, len(free)) and set(found) <= set(free)


@every_implementation
def test_some_heads_of_all(ops: Implementation):
    """A rank chooses for its own heads, out of what all have found for all."""
    case = make_case([Row.of(20, 1500)], num_kv_heads=3, dtype=HALF)
    found, selection = candidates(ops, case, Selection(4), 2), Selection(4)
    own = ops.merge_candidates(found[:, :, 1:2], case.to(ops.device).batch, selection).cpu()
    assert torch.equal(own, ops.merge_candidates(found, case.to(ops.device).batch, selection).cpu()[1:2])


@every_implementation
def test_keys_that_are_no_numbers(ops: Implementation):
    """They rank below all others, on every rank alike."""
    case = make_case([Row.of(1, 2500), Row.of(20, 1500)], dtype=HALF)
    case.caches.index_k_pages[::2] = torch.nan
    block_ids = merged(ops, case, Selection(3, 1, 1), 2)
    assert (block_ids[..., 0] == 0).all() and (block_ids[..., 1] > 0).all()


@every_implementation
@pytest.mark.parametrize("ranks", [2, 3])
def test_nothing_to_score(ops: Implementation, ranks: int):
    """All that a token sees fits in top-k."""
    case = make_case([Row.of(30, 200), Row.of(1, 100)], padding_tail=2)
    assert_selection(case, merged(ops, case, Selection(4), ranks), Selection(4))


@every_implementation
def test_loose_bounds(ops: Implementation):
    """The bounds of a batch may be those of a recorded graph, far above what its rows have."""
    case = make_case([Row.of(40, 900), Row.of(1, 1200), Row.of(0, 5)])
    loose = replace(case, batch=replace(case.batch, max_query_len=200, max_seq_len=9000))
    assert_selection(case, merged(ops, loose, Selection(4), 3), Selection(4))


@pytest.mark.parametrize(("rank", "ranks"), [(2, 2), (-1, 2), (0, 0)])
def test_no_such_share(rank: int, ranks: int):
    with pytest.raises(ValueError, match=f"rank is {rank}, but must be"):
        Share(rank, ranks)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: x[0], "of shape"),
        (lambda x: x.float(), "torch.float32"),
        (lambda x: x[..., :2], "of shape"),
        (lambda x: x.transpose(3, 4).contiguous().transpose(3, 4), "strides"),
    ],
)
def test_what_is_no_candidates(change: object, says: str):
    case = make_case([Row.of(20, 900)])
    found = candidates(CPU, case, Selection(4), 2)
    with pytest.raises(ValueError, match=says):
        CPU.merge_candidates(change(found), case.batch, Selection(4))
