"""How close is right: the assertions the kernel tests share, with the reasons for their tolerances."""

from __future__ import annotations

import torch
from torch import Tensor

from msa_backend.kernels import reference
from msa_backend.kernels.batch import BLOCK_SIZE, Batch
from msa_backend.kernels.selection import Selection

from .batches import Case


def visible_tokens(batch: Batch, num_tokens: int) -> Tensor:
    """``[num_tokens]`` how many tokens of its sequence a query sees."""
    visible = torch.zeros(num_tokens, dtype=torch.int64)
    bounds = batch.cu_seqlens_q.tolist()
    for i, (seq_len, context_len) in enumerate(zip(batch.seq_lens.tolist(), batch.context_lens.tolist(), strict=True)):
        if seq_len > 0:
            visible[bounds[i] : bounds[i + 1]] = context_len + 1 + torch.arange(bounds[i + 1] - bounds[i])
    return visible


def assert_selection(case: Case, block_ids: Tensor, selection: Selection) -> None:
    """The selection is one the definition allows, equal scores taken either way."""
    case, block_ids = case.to("cpu"), block_ids.cpu()
    visible = visible_tokens(case.batch, case.index_q.shape[0])
    assert_well_formed(block_ids, visible, num_heads=case.index_q.shape[1], topk=selection.topk)
    scores = reference.block_scores(case.index_q, case.caches, case.batch)
    longest_key = case.caches.index_k_pages.float().norm(dim=-1).nan_to_num(posinf=0).max()
    assert_best(block_ids, scores, visible, case.index_q, longest_key, selection)


def assert_well_formed(block_ids: Tensor, visible: Tensor, *, num_heads: int, topk: int) -> None:
    """As many blocks as there may be, of those the query sees."""
    num_blocks = -(-visible // BLOCK_SIZE)
    assert block_ids.dtype == torch.int32
    assert block_ids.shape == (num_heads, len(visible), topk)

    valid = block_ids >= 0
    assert (block_ids < num_blocks[:, None]).all(), "a block that the query does not see"
    assert (block_ids >= -1).all()
    assert torch.equal(valid.sum(-1), num_blocks.clamp(max=topk).expand(valid.shape[:2])), "too few or too many"
    rising = (block_ids[..., 1:] > block_ids[..., :-1]) | ~valid[..., 1:]
    assert rising.all(), "ascending, none twice, -1 at the end"


def assert_best(
    block_ids: Tensor,
    scores: Tensor,
    visible: Tensor,
    index_q: Tensor,
    longest_key: Tensor,
    selection: Selection,
) -> None:
    """The forced blocks are there, and no block left out scores better than one taken.

    Inputs of any precision are exact in fp32, and so is every product of two fp16 or bf16 numbers. What can differ
    from the fp64 scores is the sum of a dot product in fp32: by at most dim * 2**-23 * sum |q_i * k_i| where sums are
    cut off instead of rounded, as tensor cores do, and half that elsewhere; the sum is at most |q| * |k|. Products of
    fp8 numbers are summed by Hopper's tensor cores in 14 bits, 32 products at a time: 2**-13 of the largest partial sum
    is lost at each of dim / 32 steps and the last. Two blocks may be exchanged if their scores are within twice that.

    Args:
        block_ids: ``[num_heads, n, topk]``, well formed.
        scores: ``[num_heads, n, num_blocks]`` fp64.
        visible: ``[n]`` tokens that the query sees.
        index_q: ``[n, num_heads, dim]``.
        longest_key: norm of the longest index key.
    """
    num_blocks = -(-visible[:, None] // BLOCK_SIZE)
    block = torch.arange(scores.shape[-1], device=scores.device)
    chosen = torch.zeros(*scores.shape[:2], scores.shape[-1] + 1, dtype=torch.bool, device=scores.device)
    chosen = chosen.scatter(2, block_ids.long().where(block_ids >= 0, scores.shape[-1]), True)[..., :-1]
    seen = block < num_blocks
    forced = seen & ((block < selection.init_blocks) | (block >= num_blocks - selection.local_blocks))
    assert chosen[:, forced].all(), "a forced block is missing"
    if scores.shape[-1] == 0:
        return

    free = seen & ~forced
    worst_in = scores.masked_fill(~(free & chosen), torch.inf).amin(-1)
    best_out = scores.masked_fill(~(free & ~chosen), -torch.inf).amax(-1)
    dim = index_q.shape[-1]
    lost = (dim / 32 + 1) * 2.0**-13 if index_q.element_size() == 1 else dim * 2.0**-23
    rounding = lost * index_q.double().norm(dim=-1).T * longest_key
    assert (worst_in >= best_out - 2 * rounding).all(), "a better block was left out"


def assert_attention(out: Tensor, expected: Tensor, case: Case, weighed: Tensor | None = None) -> None:
    """The output is the fp64 reference's, up to fp32 arithmetic and the rounding of the result.

    Inputs are standard normal, so logits are of order 1, hardly ever above 8, and an fp32 dot product is off by a few
    2**-24 of that. An error of 5e-7 in a logit changes the output by as much of the values averaged, of order 1, and
    most errors cancel: 2e-6 leaves a margin of about 4. Rounding to the output's dtype adds half a unit in the last
    place, u: 2**-8 for bf16, 2**-11 for fp16.

    Tensor cores take both sides of a product in 16 bits. A GPU kernel on fp16 or bf16 therefore rounds

    - the softmax weights p before p . v: by at most u * p each, so by u * sum(p * |v|) in all;
    - partial outputs of a block or split, where it keeps them in 16 bits: again by u * sum(p * |v|).

    That bound holds whatever the signs. Signs are random, so over many elements the errors of the three roundings,
    each u / sqrt(3) of the output's size at most, add up as squares: to u. ||out - ref|| / ||ref|| may be 1.5 u.

    Args:
        expected: fp64.
        weighed: ``sum(p * |v|)`` like ``expected``, for an implementation whose products are in 16 bits.
    """
    out = out.to(expected.device)
    assert out.dtype == case.q.dtype
    of_output = torch.finfo(out.dtype).eps / 2 if out.dtype != torch.float32 else 0.0
    subnormal = torch.finfo(out.dtype).smallest_normal * torch.finfo(out.dtype).eps
    error = (out.double() - expected).abs()
    allowed = 2e-6 + subnormal + of_output * expected.abs()
    if weighed is not None and of_output:
        # Tensor cores cut sums off where fp32 would round, and exp2 is approximate: four times the arithmetic error.
        allowed += 6e-6 + 2 * of_output * weighed
        if out.numel() >= 4096:
            relative = error.norm() / expected.norm().clamp(min=subnormal)
            assert relative <= 1.5 * of_output, f"||out - ref|| / ||ref|| = {relative:.2e}"
    assert (error <= allowed).all(), f"off by {error.max():.2e}"
