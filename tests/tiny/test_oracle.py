"""The reference agrees with itself, however it is asked: that is the noise the tolerance has to allow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import oracle

# Half of it was measured; the tolerance is to stay ten times as wide.
NOISE = oracle.LOGPROB_TOLERANCE / 10

PROMPTS = [oracle.random_prompt(200), oracle.random_prompt(1500)]
by_length = pytest.mark.parametrize("ids", PROMPTS, ids=lambda ids: f"{len(ids)} tokens")


@by_length
def test_chunks_do_not_matter(ids: list[int], model: Any) -> None:
    whole = oracle.prompt_logprobs(model, ids, chunk=len(ids))
    assert whole.shape == (len(ids) - 1,)
    for chunk in (100, 512):
        assert (oracle.prompt_logprobs(model, ids, chunk=chunk) - whole).abs().max() < NOISE


@by_length
def test_another_attention_kernel_does_not_matter(ids: list[int], original: Path, model: Any) -> None:
    other = oracle.load(original, attention="sdpa")
    assert (oracle.prompt_logprobs(other, ids) - oracle.prompt_logprobs(model, ids)).abs().max() < NOISE


def test_logprobs_are_the_plain_forward(model: Any) -> None:
    ids = oracle.random_prompt(300)
    with torch.inference_mode():
        plain = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    assert (oracle.logprobs(model, ids, [5, 299], chunk=128) - plain[[5, 299]]).abs().max() < NOISE
    chosen = plain[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert (oracle.prompt_logprobs(model, ids, chunk=128) - chosen).abs().max() < NOISE


def test_greedy_is_the_argmax_of_the_prompt(model: Any) -> None:
    ids = oracle.random_prompt(600)
    answer = oracle.greedy(model, ids, 8)
    read = oracle.logprobs(model, ids + answer.tokens, list(range(599, 607)))
    assert read.argmax(-1).tolist() == answer.tokens
    assert (read.amax(-1) - torch.tensor(answer.logprobs)).abs().max() < NOISE
    best = read.topk(2).values
    assert (best[:, 0] - best[:, 1] - torch.tensor(answer.margins)).abs().max() < 2 * NOISE


def test_long_prompts_fit(model: Any) -> None:
    ids = oracle.random_prompt(6000)
    found = oracle.prompt_logprobs(model, ids)
    assert found.isfinite().all()
    other = oracle.prompt_logprobs(model, ids, chunk=300)
    assert (found - other).abs().max() < NOISE


def test_close_calls_are_counted(model: Any) -> None:
    calls = oracle.close_calls(model, oracle.random_prompt(700))
    assert 0 < calls.block < 0.01 and 0 < calls.expert < 0.01
    # Up to top-k blocks nothing has to be chosen.
    assert oracle.close_calls(model, oracle.random_prompt(512)).block == float("inf")


def test_altered_selection_ends_with_its_context(model: Any) -> None:
    ids = oracle.random_prompt(700)
    before = oracle.logprobs(model, ids)
    with oracle.altered_selection(model, lambda block_ids: block_ids.flip(1)), oracle.altered_topk(model, 2):
        assert not torch.equal(oracle.logprobs(model, ids), before)
    assert torch.equal(oracle.logprobs(model, ids), before)


def test_load_refuses_a_damaged_checkpoint(original: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in original.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(original / "model.safetensors")
    del weights["language_model.model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AssertionError, match="norm.weight"):
        oracle.load(tmp_path)
