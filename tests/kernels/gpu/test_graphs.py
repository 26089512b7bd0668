"""A CUDA graph recorded once serves other lengths, pages and values: what an engine replays every step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from msa_backend.kernels import api
from msa_backend.kernels.batch import Batch
from msa_backend.kernels.caches import LayerCaches
from msa_backend.kernels.selection import Selection

from ..batches import Case, Row, make_case
from ..compare import assert_attention, assert_selection
from ..implementations import ON_CUDA
from . import blocked

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not ON_CUDA, reason="needs a CUDA device")]

PAGES, TABLE = 80, 24
"""Enough for every batch below; a batch's own tensors are copied into the front of the recorded ones."""
MAX_SEQ_LEN = 128 * TABLE
SELECTION = Selection(4)
# What is recorded, and what is replayed: as many rows and tokens, but other rows, shorter and longer ones.
BATCHES = {
    "decode": [
        [Row.of(1, 500), Row.of(1, 2500), Row.of(1, 0), Row.of(1, 127)],
        [Row.of(1, 2900), Row.of(1, 128), Row(1, 0, 0), Row(1, -1, 0)],
        [Row.of(1, 5), Row.of(1, 6), Row.of(1, 7), Row.of(1, 1400)],
    ],
    "verify": [
        [Row.of(4, 500), Row.of(4, 2500), Row.of(4, 0), Row.of(4, 127)],
        [Row.of(4, 2900), Row.of(1, 126), Row.of(3, 1027), Row(4, 0, 0)],
        [Row.of(4, 1), Row.of(4, 124), Row.of(0, 50), Row.of(2, 900)],
    ],
    "any mix": [
        [Row.of(1, 500), Row.of(1, 2500), Row.of(1, 0), Row.of(1, 127)],
        [Row.of(38, 2500), Row.of(1, 700), Row(0, 0, 0), Row(0, 0, 0)],
        [Row.of(7, 1), Row.of(1, 124), Row.of(30, 900), Row(0, 0, 0)],
    ],
    "prefill": [
        [Row.of(200, 1000), Row.of(100, 50), Row.of(1, 300), Row.of(60)],
        [Row.of(20, 2500), Row.of(300, 700), Row(0, 0, 0), Row(3, 0, 0)],
        [Row.of(361), Row(0, 0, 0), Row(0, 0, 0), Row(0, 0, 0)],
    ],
}


def operations(case: Case, out: Tensor, in_one: Tensor) -> Tensor:
    """What a layer runs, in one operation and in two, by a batch that has planned nothing yet: an engine describes
    every step anew, and the graph that it records holds the planning too."""
    batch = replace(case.batch)
    block_ids = api.select_blocks(case.index_q, case.caches, batch, SELECTION)
    api.sparse_attention(case.q, case.caches, block_ids, batch, case.scale, out)
    for _ in range(2):  # two layers share a plan
        api.attend(case.q, case.index_q, case.caches, batch, SELECTION, case.scale, in_one)
    return block_ids


def room_for(num_tokens: int, num_rows: int, max_query_len: int, dtype: torch.dtype) -> Case:
    """Tensors at fixed addresses, as an engine holds them."""
    case = make_case([Row.of(0)] * num_rows, num_kv_heads=2, group=16, dim=128, dtype=dtype,
                     padding_tail=num_tokens, device="cuda")  # fmt: skip
    nothing = torch.full((PAGES, 2, 128, 256), torch.nan, dtype=dtype, device="cuda")
    k_pages, v_pages = nothing.chunk(2, dim=-1)
    batch = replace(
        case.batch,
        block_table=torch.full((num_rows, TABLE), -1, dtype=torch.int32, device="cuda"),
        max_query_len=max_query_len,
        max_seq_len=MAX_SEQ_LEN,
    )
    return replace(case, caches=LayerCaches(k_pages, v_pages, nothing[:, 0, :, :128].clone()), batch=batch)


def fill(fixed: Case, case: Case) -> None:
    for name in ("q", "index_q"):
        getattr(fixed, name).fill_(torch.nan)[: len(case.q)].copy_(getattr(case, name))
    for name in ("k_pages", "v_pages", "index_k_pages"):
        into, new = getattr(fixed.caches, name), getattr(case.caches, name)
        into.fill_(torch.nan)[: len(new)].copy_(new)
    for name in ("cu_seqlens_q", "seq_lens"):
        getattr(fixed.batch, name).copy_(getattr(case.batch, name))
    width = min(TABLE, case.batch.block_table.shape[1])
    fixed.batch.block_table.fill_(10**6)[:, :width].copy_(case.batch.block_table[:, :width])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", BATCHES)
def test_replayed_with_other_batches(kind: str, dtype: torch.dtype):
    num_tokens = max(sum(row.query_len for row in rows) for rows in BATCHES[kind]) + 3
    max_query_len = max(row.query_len for rows in BATCHES[kind] for row in rows)
    if kind == "any mix":
        max_query_len = num_tokens
    fixed = room_for(num_tokens, 4, max_query_len, dtype)
    shape = {"num_kv_heads": 2, "group": 16, "dim": 128, "dtype": dtype}
    cases = [
        make_case(rows, **shape, padding_tail=num_tokens - sum(row.query_len for row in rows), seed=seed)
        for seed, rows in enumerate(BATCHES[kind])
    ]

    fill(fixed, cases[0].to("cuda"))
    out, in_one = torch.empty_like(fixed.q), torch.empty_like(fixed.q)
    operations(fixed, out, in_one)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        block_ids = operations(fixed, out, in_one)

    for case in (cases[1], cases[2], cases[0], cases[1]):
        fill(fixed, case.to("cuda"))
        for x in (out, in_one):
            x.fill_(torch.nan)
        block_ids.fill_(-7)
        graph.replay()
        eager_out, eager_in_one = torch.full_like(out, torch.nan), torch.full_like(out, torch.nan)
        eager_ids = operations(fixed, eager_out, eager_in_one)
        # The same kernels on the same grids. The inversion's lists are in the order in which atomics came, but a
        # (token, block) pair is computed by itself wherever it stands, and pairs are combined in the order of slots:
        # bit for bit the same.
        assert torch.equal(block_ids, eager_ids)
        assert torch.equal(out, eager_out)
        assert torch.equal(in_one, eager_in_one)
        assert torch.equal(in_one, out)

        assert_selection(case, block_ids.cpu(), SELECTION)
        live = torch.arange(case.num_live_tokens, device="cuda")
        assert (out[case.num_live_tokens :] == 0).all()
        seen = (block_ids[0, : case.num_live_tokens] >= 0).any(-1)
        assert (out[: case.num_live_tokens][~seen] == 0).all()
        expected, weighed = blocked.attention(case.to("cuda"), live[seen], block_ids)
        assert_attention(out[live[seen]], expected, case, weighed)


def test_lengths_that_change_within_a_graph():
    """As those of a draft do, whose steps vLLM records one after another: each is planned by lengths of its own."""
    rows = [Row.of(1, 500), Row.of(1, 2500), Row.of(1, 126), Row(1, 0, 0)]
    fixed = room_for(4, 4, 1, torch.bfloat16)
    case = make_case(rows, num_kv_heads=2, group=16, dim=128, dtype=torch.bfloat16)
    fill(fixed, case.to("cuda"))
    one, other = torch.empty_like(fixed.q), torch.empty_like(fixed.q)
    alive = fixed.batch.seq_lens > 0

    def two_steps(batch: Batch) -> None:
        for out in (one, other):
            api.attend(fixed.q, fixed.index_q, fixed.caches, batch, SELECTION, fixed.scale, out)
            batch.seq_lens.sub_(alive.int() * 129)
            batch.forget_lengths()

    two_steps(replace(fixed.batch))  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        two_steps(replace(fixed.batch))
    fill(fixed, case.to("cuda"))
    graph.replay()
    for out in (one, other):
        fill(fixed, case.to("cuda"))
        if out is other:
            fixed.batch.seq_lens.sub_(alive.int() * 129)
        alone = api.attend(fixed.q, fixed.index_q, fixed.caches, replace(fixed.batch), SELECTION, fixed.scale)
        assert torch.equal(out, alone)
    assert not torch.equal(one, other)
