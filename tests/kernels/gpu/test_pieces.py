"""Prefill however it is cut: into slices, lists and kernels, the result is that of the definition."""

from __future__ import annotations

import importlib

import pytest
import torch

from msa_backend.kernels import reference
from msa_backend.kernels.gpu import query_outer
from msa_backend.kernels.gpu.prefill import invert, kv_outer
from msa_backend.kernels.gpu.workspace import workspace_of
from msa_backend.kernels.selection import Selection

from ..batches import Case, Row, make_case
from ..compare import assert_attention, assert_selection
from ..implementations import GPU

pytestmark = pytest.mark.gpu
SELECTION = Selection(3)
# Long rows that begin anywhere, one that begins inside a slice, rows without tokens, padding at the end.
ROWS = [Row.of(20, 900), Row.of(0, 300), Row.of(25), Row(1, 0, 0), Row.of(18, 700)]


def case_of(seed: int = 0) -> Case:
    return make_case(ROWS, num_kv_heads=3, group=3, dim=16, dtype=torch.float32, padding_tail=3, seed=seed)


# The package gives the operations these names, and so hides the modules.
SELECT, ATTEND, BOTH = (
    importlib.import_module(f"msa_backend.kernels.gpu.{name}")
    for name in ("select_blocks", "sparse_attention", "attend")
)


@pytest.fixture(autouse=True)
def long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of a few tokens take the long steps' way."""
    monkeypatch.setattr(ATTEND, "SHORT_STEP", 0)


def check(case: Case) -> None:
    on_device = case.to(GPU.device)
    arguments = on_device.caches, on_device.batch
    block_ids = GPU.select_blocks(on_device.index_q, *arguments, SELECTION)
    assert_selection(case, block_ids.cpu(), SELECTION)
    expected = reference.sparse_attention(case.q, case.caches, block_ids.cpu(), case.batch, case.scale)
    in_two, in_one = (torch.full_like(on_device.q, torch.nan) for _ in range(2))
    GPU.sparse_attention(on_device.q, on_device.caches, block_ids, on_device.batch, case.scale, in_two)
    GPU.attend(on_device.q, on_device.index_q, *arguments, SELECTION, case.scale, in_one)
    for out in (in_two, in_one):
        assert_attention(out.cpu(), expected, case)
        assert (out[case.num_live_tokens :] == 0).all()


@pytest.mark.parametrize("tokens", [1, 7, 33])
def test_slices_of_tokens(tokens: int, monkeypatch: pytest.MonkeyPatch):
    """Scores of so many tokens at a time, and partial outputs of so many and one KV head."""
    case = case_of()
    blocks = -(-case.batch.max_seq_len // 128)
    monkeypatch.setattr(SELECT, "MAX_SCORE_BYTES", tokens * 4 * 3 * blocks)
    monkeypatch.setattr(ATTEND, "MAX_PARTIAL_BYTES", tokens * SELECTION.topk * 4 * 16 * 4)
    check(case)


def test_slices_of_heads(monkeypatch: pytest.MonkeyPatch):
    """Two of three KV heads at a time, of all tokens."""
    case = case_of(seed=1)
    monkeypatch.setattr(ATTEND, "MAX_PARTIAL_BYTES", 2 * case.q.shape[0] * SELECTION.topk * 4 * 16 * 4)
    check(case)


@pytest.mark.parametrize("most", [2, 16])
def test_several_lists_of_a_page(most: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(invert, "LIST_TOKENS", 1)
    monkeypatch.setattr(invert, "MAX_LISTS_OF_A_PAGE", most)
    check(case_of(seed=2))


@pytest.mark.parametrize("blocks", [1, 3, 4, 100])
def test_either_kernel(blocks: int, monkeypatch: pytest.MonkeyPatch):
    """However many blocks a tile may select to be taken queries outer, each token is attended to by one kernel."""
    monkeypatch.setattr(query_outer, "most_blocks", lambda topk: blocks)
    monkeypatch.setattr(ATTEND, "road_of", lambda *_: ATTEND.Road(kv_outer=True, splits=False))
    monkeypatch.setattr(BOTH, "road_of", lambda *_: ATTEND.Road(kv_outer=True, splits=False))
    case = case_of(seed=3).to(GPU.device)
    check(case_of(seed=3))
    GPU.attend(case.q, case.index_q, case.caches, case.batch, SELECTION, case.scale)
    tokens = case.batch.cu_seqlens_q.diff()[case.batch.seq_lens > 0]
    tiles = -(-tokens // query_outer.tile_tokens(3))
    taken = workspace_of(case.batch).hold("taken", 3 * int(tiles.sum()), torch.int32)
    share = taken.float().mean().item()
    assert share == 1 if blocks == 100 else 0 < share < 1 or blocks == 1


def test_short_work_items(monkeypatch: pytest.MonkeyPatch):
    """Items of one tile each."""
    monkeypatch.setattr(kv_outer, "MIN_ITEM_TOKENS", 1)
    monkeypatch.setattr(kv_outer, "MAX_ITEM_TOKENS", 1)
    check(case_of(seed=4))
