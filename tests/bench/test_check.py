"""The check before timing: it passes what is right, with a tie or rounding, and sees each way of being wrong."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from msa_backend.bench import check, inputs
from msa_backend.bench.baselines.ours import attend, select
from msa_backend.bench.cases import PRESETS, Case
from msa_backend.bench.inputs import Inputs
from msa_backend.kernels import reference

CASES = {case.mode: case for case in PRESETS["small"]()}


@pytest.fixture(params=CASES)
def made(request: pytest.FixtureRequest) -> Inputs:
    return make(CASES[request.param])


def make(case: Case) -> Inputs:
    return inputs.make_inputs(case, inputs.make_cache(case, torch.device("cpu"), seed=0), seed=0)


def test_samples_are_first_last_and_between(made: Inputs) -> None:
    tokens = list(check.sample(made, 5))
    last = made.case.num_tokens - 1
    assert (tokens[0].number, tokens[-1].number) == (0, last)
    assert tokens[-1].visible == made.case.lengths[-1]
    assert tokens[0].visible == made.case.lengths[0] - made.case.new_tokens + 1


def test_right_results_pass(made: Inputs) -> None:
    block_ids = select(made)
    assert check.selection_error(block_ids, made) <= check.SELECTION_TOLERANCE["fp32"]
    assert check.attention_error(attend(made, block_ids), block_ids, made) < 1e-5
    dense = reference.dense_attention(made.q, made.caches, made.batch, made.scale)
    assert check.attention_error(dense, None, made) < 1e-12


def test_scores_are_the_definitions_over_visible_tokens_alone(made: Inputs) -> None:
    exact = reference.block_scores(made.index_q, made.caches, made.batch)
    for token in check.sample(made, 5):
        scores, size = check._block_scores(token, made)
        assert torch.allclose(scores, exact[:, token.number, : scores.shape[1]], rtol=1e-12)
        assert (scores.amax(1) <= size).all() and (size < 100).all()  # no key of the garbage, of norm 566, counts


def own_block_missing(ids: Tensor) -> None:
    ids[-1] = next(block for block in range(99) if block not in ids)


def one_twice(ids: Tensor) -> None:
    ids[0] = ids[1]


def one_left_out(ids: Tensor) -> None:
    ids[0] = -1


def unseen(ids: Tensor) -> None:
    ids[0] = 1000


@pytest.mark.parametrize("spoil", [own_block_missing, one_twice, one_left_out, unseen])
def test_a_selection_that_breaks_its_contract_is_infinitely_wrong(spoil: Callable[[Tensor], None]) -> None:
    made = make(CASES["decode"])
    block_ids = select(made)
    spoil(block_ids[1, -1])
    assert check.selection_error(block_ids, made) == math.inf


def test_a_worse_block_is_seen_by_how_much_worse_it_is() -> None:
    made = make(CASES["decode"])
    block_ids = select(made)
    ids = block_ids[0, 0]
    scores = reference.block_scores(made.index_q, made.caches, made.batch)[0, 0, :-1]
    ids[:3] = scores.argsort()[:3].sort().values  # the worst, and the own block
    assert check.selection_error(block_ids, made) > 10 * check.SELECTION_TOLERANCE["fp32"]


def test_a_wrong_output_is_seen(made: Inputs) -> None:
    block_ids = select(made)
    out = attend(made, block_ids)
    other = block_ids.clone()
    other[:, :, 0] = (other[:, :, 0] - 1) % block_ids[:, :, 0].clamp(min=1)
    assert check.attention_error(attend(made, other), block_ids, made) > check.ATTENTION_TOLERANCE["bf16"]
    out[-1, -1, -1] = torch.nan
    assert check.attention_error(out, block_ids, made) == math.inf
