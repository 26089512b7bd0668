"""A wrong selection cannot pass: it moves logits by many times the tolerance, at every position looked at."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from msa_backend.tiny import TinyShape
from tests import oracle

NOTICEABLE = 20 * oracle.LOGPROB_TOLERANCE
TOPK = TinyShape().topk
EVERYTHING = 1000
SPARSE_LAYERS = [1, 2, 3]
PROMPTS = [oracle.random_prompt(700), oracle.random_prompt(1500), oracle.random_prompt(2600)]


@pytest.fixture(scope="module", params=PROMPTS, ids=lambda prompt: f"{len(prompt)} tokens")
def least_move(request: pytest.FixtureRequest, model: Any) -> Callable[[], float]:
    """How far the current alteration of the model moves the log-probabilities where it moves them least."""
    ids = request.param
    positions = list(range(TOPK * 128 + 60, len(ids), 97))
    before = oracle.logprobs(model, ids, positions)

    def measure() -> float:
        moved = float((oracle.logprobs(model, ids, positions) - before).abs().amax(-1).min())
        print(f"moved by {moved:.2f} at least")
        return moved

    return measure


def without(rank: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Drop the block at this rank of the selection; rank 0 is the query's own block."""

    def change(block_ids: torch.Tensor) -> torch.Tensor:
        changed = block_ids.clone()
        changed[..., rank] = -1
        return changed

    return change


def test_nothing_altered_moves_nothing(least_move: Callable[[], float]) -> None:
    assert least_move() == 0


@pytest.mark.parametrize("topk", [TOPK - 1, TOPK + 1, EVERYTHING], ids=["one fewer", "one more", "dense"])
def test_topk(topk: int, model: Any, least_move: Callable[[], float]) -> None:
    with oracle.altered_topk(model, topk):
        assert least_move() > NOTICEABLE


@pytest.mark.parametrize("layer", SPARSE_LAYERS)
@pytest.mark.parametrize("rank", [1, TOPK - 1], ids=["best", "last"])
def test_one_dropped_block_in_one_layer(rank: int, layer: int, model: Any, least_move: Callable[[], float]) -> None:
    with oracle.altered_selection(model, without(rank), [layer]):
        assert least_move() > NOTICEABLE


@pytest.mark.parametrize("group", range(TinyShape().kv_heads))
def test_one_dropped_block_in_one_group_of_the_last_layer(
    group: int, model: Any, least_move: Callable[[], float]
) -> None:
    def change(block_ids: torch.Tensor) -> torch.Tensor:
        changed = block_ids.clone()
        changed[:, group, :, TOPK - 1] = -1
        return changed

    with oracle.altered_selection(model, change, SPARSE_LAYERS[-1:]):
        assert least_move() > NOTICEABLE


def test_groups_swapped(model: Any, least_move: Callable[[], float]) -> None:
    # In all layers: in one alone, both groups of a token may happen to have chosen the same blocks.
    with oracle.altered_selection(model, lambda block_ids: block_ids.flip(1)):
        assert least_move() > NOTICEABLE


@pytest.mark.parametrize("quirk", ["routing bias", "clamp"])
def test_the_quirks_of_the_experts_show_too(quirk: str, model: Any, least_move: Callable[[], float]) -> None:
    experts = [oracle.text_layers(model)[layer].mlp for layer in SPARSE_LAYERS]
    with contextlib.ExitStack() as restore:
        for mlp in experts:
            if quirk == "clamp":
                restore.callback(setattr, mlp.experts, "limit", mlp.experts.limit)
                restore.callback(setattr, mlp.experts, "swiglu_limit", mlp.experts.swiglu_limit)
                mlp.experts.limit = mlp.experts.swiglu_limit = 1e9
            else:
                bias = mlp.gate.e_score_correction_bias
                restore.callback(bias.copy_, bias.clone())
                bias.zero_()
        assert least_move() > NOTICEABLE
