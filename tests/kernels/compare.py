"""How close is right: the assertions the kernel tests share, with the reasons for their tolerances."""

from __future__ import annotations

import torch
from torch import Tensor

from msa_backend.kernels import reference
from msa_backend.kernels.batch import BLOCK_SIZE

from .batches import Case

FP32_ROUNDING = 2.0**-24


def visible_tokens(case: Case) -> Tensor:
    """``[num_tokens]`` how many tokens of its sequence a query sees."""
    visible = torch.zeros(case.q.shape[0], dtype=torch.int64)
    for row in reference.rows(case.batch):
        visible[row.tokens] = row.visible.sum(dim=1)
    return visible


def assert_selection(case: Case, block_ids: Tensor, *, topk: int, init_blocks: int = 0, local_blocks: int = 1) -> None:
    """The selection is one the definition allows, equal scores taken either way.

    Inputs of any precision are exact in fp32, and so is every product of two fp16 or bf16 numbers. What can differ
    from the fp64 reference is the rounding of a dot product in fp32: by at most dim * 2**-24 * sum |q_i * k_i|, and
    that sum is at most |q| * |k|. Two blocks may be exchanged if their scores are within twice that.
    """
    num_blocks = -(-visible_tokens(case) // BLOCK_SIZE)
    assert block_ids.dtype == torch.int32
    assert block_ids.shape == (case.index_q.shape[1], case.index_q.shape[0], topk)

    valid = block_ids >= 0
    assert (block_ids < num_blocks[:, None]).all(), "a block that the query does not see"
    assert (block_ids >= -1).all()
    assert torch.equal(valid.sum(-1), num_blocks.clamp(max=topk).expand(valid.shape[:2])), "too few or too many"
    rising = (block_ids[..., 1:] > block_ids[..., :-1]) | ~valid[..., 1:]
    assert rising.all(), "ascending, none twice, -1 at the end"

    scores = reference.block_scores(case.index_q, case.index_k_pages, case.batch)
    block = torch.arange(scores.shape[-1])
    chosen = torch.zeros(*scores.shape[:2], scores.shape[-1] + 1, dtype=torch.bool)
    chosen = chosen.scatter(2, block_ids.long().where(valid, scores.shape[-1]), True)[..., :-1]
    visible = block < num_blocks[:, None]
    forced = visible & ((block < init_blocks) | (block >= num_blocks[:, None] - local_blocks))
    assert chosen[:, forced].all(), "a forced block is missing"

    free = visible & ~forced
    worst_in = scores.masked_fill(~(free & chosen), torch.inf).amin(-1) if len(block) else torch.zeros(())
    best_out = scores.masked_fill(~(free & ~chosen), -torch.inf).amax(-1) if len(block) else torch.zeros(())
    longest_key = case.index_k_pages.float().norm(dim=-1).nan_to_num(posinf=0).max()
    dim = case.index_q.shape[-1]
    rounding = dim * FP32_ROUNDING * case.index_q.float().norm(dim=-1).T * longest_key
    assert (worst_in >= best_out - 2 * rounding).all(), "a better block was left out"


def assert_attention(out: Tensor, expected: Tensor, case: Case) -> None:
    """The output is the fp64 reference's, up to fp32 arithmetic and the rounding of the result.

    Inputs are standard normal, so logits are of order 1, hardly ever above 8, and an fp32 dot product is off by a few
    2**-24 of that. An error of 5e-7 in a logit changes the output by as much of the values averaged, of order 1, and
    most errors cancel: 2e-6 leaves a margin of about 4. Rounding to the output's dtype adds half a unit in the last
    place.
    """
    assert out.dtype == case.q.dtype
    of_output = torch.finfo(out.dtype).eps / 2 if out.dtype != torch.float32 else 0.0
    subnormal = torch.finfo(out.dtype).smallest_normal * torch.finfo(out.dtype).eps
    error = (out.double() - expected).abs()
    allowed = 2e-6 + subnormal + of_output * expected.abs()
    assert (error <= allowed).all(), f"off by {error.max():.2e}"
