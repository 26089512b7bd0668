"""The model that is trained is the model that is served."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nano.export import export, load, original_names
from nano.initial import initialise
from nano.model import NEAR, Nano, Reading, attend, indexer_lesson
from torch import Tensor

from tests import oracle

from .small import SMALL


@pytest.fixture(scope="module")
def model() -> Nano:
    model = Nano(SMALL)
    initialise(model, seed=3)
    with torch.no_grad():
        # Nothing that training changes may be left at a value that hides it.
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
        for name, buffer in model.named_buffers():
            buffer += 0.2 * torch.randn(buffer.shape, generator=torch.Generator().manual_seed(len(name)))
    return model.eval()


@pytest.fixture(scope="module")
def exported(model: Nano, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(model, tmp_path_factory.mktemp("nano") / "exported", "float32")


@pytest.fixture(scope="module")
def reference(exported: Path) -> Any:
    return oracle.load(exported)


def logprobs(model: Nano, ids: list[int], reading: Reading) -> Tensor:
    with torch.no_grad():
        return model.lm_head(model(torch.tensor([ids]), reading)[0]).log_softmax(-1)


@pytest.mark.parametrize("length", [100, 1500])
def test_logits_are_those_of_transformers(length: int, model: Nano, reference: Any):
    ids = oracle.random_prompt(length)
    positions = list(range(0, length, 7))
    found = logprobs(model, ids, Reading(topk=SMALL.topk))[positions]
    assert (found - oracle.logprobs(reference, ids, positions)).abs().max() < oracle.LOGPROB_TOLERANCE


@pytest.mark.parametrize(
    "reading",
    [
        Reading(topk=None),
        Reading(topk=3),
        Reading(topk=4, damage=lambda scores: scores.roll(1, -1)),
        Reading(topk=4, far_handicap=3.0),
    ],
    ids=["dense", "top-k 3", "one block off", "handicap"],
)
def test_other_ways_to_read_are_told_apart(reading: Reading, model: Nano, reference: Any):
    ids = oracle.random_prompt(1500)
    positions = list(range(1000, 1500, 7))
    found = logprobs(model, ids, reading)[positions]
    assert (found - oracle.logprobs(reference, ids, positions)).abs().max() > 100 * oracle.LOGPROB_TOLERANCE


def test_an_exported_model_is_read_again(model: Nano, exported: Path):
    again = load(exported, SMALL)
    assert set(again) == set(model.state_dict())
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again[name]), name


def test_other_folders_are_no_checkpoint_of_the_recipe(exported: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="name a checkpoint that the recipe exported"):
        load(tmp_path, SMALL)
    with pytest.raises(ValueError, match="has other sizes"):
        load(exported, replace(SMALL, expert_size=16))


def test_each_weight_has_one_original_name(model: Nano):
    named = original_names(model.state_dict(), SMALL)
    assert sum(weight.numel() for weight in named.values()) == sum(w.numel() for w in model.state_dict().values())


def test_positions_turn_keys_and_queries_alike(model: Nano):
    """Only distances count, up to rounding of large angles."""
    ids = torch.tensor([oracle.random_prompt(200)])
    with torch.no_grad():
        near = model(ids, Reading(topk=4), torch.arange(200)[None])
        far = model(ids, Reading(topk=4), torch.arange(200)[None] + 4096)
        gap = model(ids, Reading(topk=4), (torch.arange(200) + 4096 * (torch.arange(200) > 100))[None])
    assert (near - far).abs().max() < 1e-2 < (near - gap)[:, 101:].abs().max()
    assert torch.equal(near[:, :101], gap[:, :101])


def test_attention_by_groups():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 5, 8, generator=generator) for heads in (4, 2, 2))
    mask = torch.full((2, 2, 5, 5), -torch.inf).masked_fill(torch.rand(2, 2, 5, 5, generator=generator) < 0.5, 0.0)
    mask[..., range(5), range(5)] = 0.0
    found = attend(q, k, v, mask)
    for head in range(4):
        logits = q[:, head] @ k[:, head // 2].transpose(-1, -2) * 8**-0.5 + mask[:, head // 2]
        torch.testing.assert_close(found[:, head], logits.softmax(-1) @ v[:, head // 2])


def lesson(index_q: Tensor, index_k: Tensor, q: Tensor, k: Tensor, topk: int | None = None) -> tuple[Tensor, Tensor]:
    rows = torch.tensor([[70, 95]])
    return indexer_lesson(q, k, index_q, index_k, Reading(block=8, topk=topk, rows=rows))


def test_the_lesson_is_least_for_the_attention_itself():
    """One query head, and index heads that score as it attends, one key a block: no other scores do better."""
    generator = torch.Generator().manual_seed(0)
    q, k, wrong = (torch.randn(1, 1, 96, 128, generator=generator) for _ in range(3))
    k[:, :, torch.arange(96) % 8 != 0] = 0.0
    q = q * 3
    # Of each block but one key is zero. Its logit is the block's best where it is above zero; so make all of them.
    k = torch.where((q[:, :, 95:] * k).sum(-1, keepdim=True) < 0, -k, k)
    rows = torch.tensor([[95]])
    reading = Reading(block=8, rows=rows, topk=12)
    right, recall = indexer_lesson(q, k, q, k, reading)
    other, _ = indexer_lesson(q, k, wrong, k, reading)
    assert right < other
    assert recall == pytest.approx(1.0)


def test_the_recall_is_what_the_choice_holds():
    """Attention is on one block alone, and the indexer prefers another: with one to choose it holds nothing."""
    q, k, index_k = (torch.zeros(1, 1, 96, 128) for _ in range(3))
    q[..., 0] = 400.0
    k[:, :, 20, 0] = 1.0
    index_q = q.clone()
    index_k[:, :, 20, 0], index_k[:, :, 40, 0] = 0.5, 1.0
    _, one = lesson(index_q, index_k, q, k, topk=2)
    _, two = lesson(index_q, index_k, q, k, topk=3)
    assert (one, two) == (pytest.approx(0.0, abs=1e-6), pytest.approx(1.0))


def test_the_lesson_teaches_the_indexer_alone(model: Nano):
    ids = torch.tensor([oracle.random_prompt(256)])
    reading = Reading(block=8, rows=torch.tensor([[100, 200, 255]]))
    model.zero_grad()
    model(ids, reading)
    assert len(reading.lessons) == len(reading.recalls) == sum(SMALL.sparse_attention)
    torch.stack(reading.lessons).sum().backward()
    taught = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    model.zero_grad(set_to_none=True)
    assert taught == {name for name, _ in model.named_parameters() if ".index_" in name}


def test_the_first_layer_begins_by_looking_back():
    """Head 0 one token, head 1 two, however far the text goes on, and though each far key counts as a thousand."""
    model = Nano(SMALL)
    initialise(model, seed=0)
    first = model.layers[0].self_attn
    seen: list[Tensor] = []

    def watch(module: Any, inputs: tuple[Any, ...], _: Any) -> None:
        from nano.model import rotate

        x, turn, _ = inputs
        heads = [p(x).unflatten(-1, (-1, 128)).transpose(1, 2) for p in (module.q_proj, module.k_proj)]
        q, k = (rotate(norm(h), turn) for norm, h in zip((module.q_norm, module.k_norm), heads, strict=True))
        logits = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 128**-0.5
        places = torch.arange(x.shape[1])
        behind = places[:, None] - places
        logits = logits + 7.0 * (behind > NEAR)
        seen.append(logits.masked_fill(behind < 0, -torch.inf).softmax(-1)[0])

    handle = first.register_forward_hook(watch)
    with torch.no_grad():
        model(torch.tensor([oracle.random_prompt(900)]), Reading())
    handle.remove()
    (attention,) = seen
    for head in (0, 2):  # the first of each group
        back = attention[head].diagonal(-1)[100:]
        assert back.mean() > 0.8
