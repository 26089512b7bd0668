"""Top-k over given scores against a sort, on a GPU if there is one, else under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from msa_backend.kernels.batch import BLOCK_SIZE, Batch
from msa_backend.kernels.gpu import topk as gpu_topk
from msa_backend.kernels.gpu.plan import Shape, plan_of
from msa_backend.kernels.selection import Selection

from ..batches import Row, make_case
from ..implementations import ON_CUDA

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if ON_CUDA else "cpu"
FORCED = [(0, 1), (2, 1), (0, 0), (1, 3)]


def batch_of(rows: list[Row]) -> Batch:
    """The metadata of ``rows`` alone: nothing here reads a cache."""
    bounds = torch.tensor([0] + [row.query_len for row in rows]).cumsum(0).int()
    max_seq_len = max(row.seq_len for row in rows)
    return Batch(
        cu_seqlens_q=bounds.to(DEVICE),
        seq_lens=torch.tensor([row.seq_len for row in rows], dtype=torch.int32, device=DEVICE),
        block_table=torch.zeros(len(rows), -(-max_seq_len // BLOCK_SIZE), dtype=torch.int32, device=DEVICE),
        max_query_len=max(row.query_len for row in rows),
        max_seq_len=max_seq_len,
    )


def choose(batch: Batch, scores: Tensor | None, shape: tuple[int, int], selection: Selection) -> Tensor:
    num_heads, num_tokens = shape
    plan = plan_of(batch, Shape(num_tokens=num_tokens, num_kv_heads=num_heads, topk=selection.topk))
    block_ids = torch.full((num_heads, num_tokens, selection.topk), -7, dtype=torch.int32, device=DEVICE)
    gpu_topk.select_topk(scores, batch, selection, plan, block_ids)()
    return block_ids.cpu()


def check(rows: list[Row], scores: Tensor, selection: Selection, tail: int = 0) -> None:
    batch = batch_of(rows)
    topk, init_blocks, local_blocks = selection.topk, selection.init_blocks, selection.local_blocks
    num_heads, num_tokens, width = scores.shape
    padded = torch.full((num_heads, num_tokens, -(-width // 16) * 16), torch.nan)
    padded[..., :width] = scores
    ids = choose(batch, padded.to(DEVICE), (num_heads, num_tokens), selection)
    seen = [
        -(-min(row.context_len + i + 1, row.seq_len) // BLOCK_SIZE) if row.seq_len else 0
        for row in rows
        for i in range(row.query_len)
    ]
    visible = torch.tensor(seen + [0] * tail)
    assert ids.shape == (num_heads, num_tokens, topk)
    valid = ids >= 0
    assert torch.equal(valid.sum(-1), visible.clamp(max=topk).expand(num_heads, -1))
    assert (ids >= -1).all() and (ids < visible[:, None]).all()
    assert ((ids[..., 1:] > ids[..., :-1]) | ~valid[..., 1:]).all()
    block = torch.arange(scores.shape[-1])
    seen_blocks = block < visible[:, None]
    forced = seen_blocks & ((block < init_blocks) | (block >= visible[:, None] - local_blocks))
    key = scores.masked_fill(scores.isnan(), -torch.inf).masked_fill(forced, torch.inf)
    got = key.gather(2, ids.clamp(min=0).long()).masked_fill(~valid, -torch.inf).sort(-1, descending=True).values
    best = key.masked_fill(~seen_blocks, -torch.inf).sort(-1, descending=True).values[..., :topk]
    best = torch.nn.functional.pad(best, (0, max(0, topk - best.shape[-1])), value=-torch.inf)
    assert torch.equal(got, best)


def random_scores(num_heads: int, num_tokens: int, blocks: int, kind: str) -> Tensor:
    scores = torch.randn(num_heads, num_tokens, blocks)
    if kind == "ties":
        scores = (scores * 2).round()
    elif kind == "equal":
        scores.fill_(-3.5)
    elif kind == "special":
        special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-40, -1e-40, -torch.nan])
        scores = special[torch.randint(len(special), scores.shape)]
    elif kind == "rising":
        scores = torch.arange(blocks).expand(scores.shape).float().contiguous()
    return scores


@pytest.mark.parametrize("kind", ["random", "ties", "equal", "special", "rising"])
@pytest.mark.parametrize(("init_blocks", "local_blocks"), FORCED)
@pytest.mark.parametrize("topk", [4, 13, 16, 32])
@pytest.mark.parametrize("blocks", [40, 512, 600, 2048, 8192])
def test_choice(blocks: int, topk: int, init_blocks: int, local_blocks: int, kind: str):
    if DEVICE == "cpu" and blocks > 600 and (topk != 16 or init_blocks):
        pytest.skip("slow under the interpreter")
    context = blocks * BLOCK_SIZE
    rows = [Row.of(2, context - 2), Row(1, 0, 0), Row.of(1, context // 2), Row.of(1, 100)]
    tail = 1
    scores = random_scores(2, 4 + 1 + tail, -(-blocks // 8) * 8, kind)
    check(rows, scores, Selection(topk, init_blocks, local_blocks), tail)


@pytest.mark.parametrize("blocks", [40, 600])
def test_garbage_past_the_visible_blocks(blocks: int):
    """A query that sees few blocks of a wide row: what lies beyond, in its row of scores, is never read as a score."""
    rows = [Row.of(5, 20 * BLOCK_SIZE - 3), Row.of(1, blocks * BLOCK_SIZE - 1)]
    scores = random_scores(2, 6, blocks, "random")
    scores[:, :5, 21:] = torch.tensor([torch.inf, torch.nan])[torch.randint(2, (2, 5, blocks - 21))]
    check(rows, scores, Selection(8))


def test_short_sequences_under_a_long_bound():
    """What a graph captured for the longest context does at any other: both ways to choose in one kernel."""
    rows = [Row.of(1, n * BLOCK_SIZE - 1) for n in (10, 40, 512, 513, 700)]
    check(rows, random_scores(2, 5, 704, "random"), Selection(16, 1, 1))


def test_no_scores_needed():
    case = make_case([Row.of(300), Row.of(1, 1200), Row(1, -1, 0)], padding_tail=2).to(DEVICE)
    block_ids = choose(case.batch, None, (2, 304), Selection(16))
    visible = torch.tensor([i // 128 + 1 for i in range(300)] + [10, 0, 0, 0])
    everything = torch.arange(16).expand(304, 16)
    everything = everything.where(everything < visible[:, None], -1).int()
    assert torch.equal(block_ids, everything.expand(2, -1, -1))
