"""``attn_implementation="msa"`` is the eager attention of ``transformers``, to the rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from msa_backend.config import MSAError
from msa_backend.transformers import register

from . import oracle
from .images import IMAGE, Prompt, Reader, picture

LENGTH = 1100
TOLERANCE = oracle.LOGPROB_TOLERANCE


def prompts(*lengths: int) -> Tensor:
    return torch.tensor([oracle.random_prompt(length, seed) for seed, length in enumerate(lengths)])


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    register()
    return oracle.load(tiny, attention="msa")


@torch.inference_mode()
def logprobs(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    return model(input_ids=ids, **inputs).logits.float().log_softmax(-1)


def test_a_prompt_at_once(model: Any, truth: Any):
    ids = prompts(LENGTH)
    assert (logprobs(model, ids) - logprobs(truth, ids)).abs().max() < TOLERANCE


@pytest.mark.parametrize("chunk", [100, 128, 512])
def test_a_prompt_in_chunks(chunk: int, model: Any, truth: Any):
    ids = oracle.random_prompt(LENGTH)
    found = oracle.prompt_logprobs(model, ids, chunk)
    assert (found - oracle.prompt_logprobs(truth, ids)).abs().max() < TOLERANCE


def test_its_selection_matters(model: Any, truth: Any):
    ids = prompts(LENGTH)
    with oracle.altered_topk(model, 3):
        found = logprobs(model, ids)
    assert (found - logprobs(truth, ids))[:, -1].abs().max() > 100 * TOLERANCE


def generate(model: Any, ids: Tensor, count: int, **options: Any) -> Any:
    """Greedily, whatever ends a text. Without a mask ``transformers`` would take one of the ids for padding."""
    options = {"attention_mask": torch.ones_like(ids)} | options
    return model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=-1, pad_token_id=0, **options)


@pytest.mark.parametrize("count", [1, 2])
def test_generate(count: int, model: Any, truth: Any):
    ids = prompts(*[700] * count)  # the answer goes over a block's boundary
    options = {"output_logits": True, "return_dict_in_generate": True}
    said, true = (generate(m, ids, 140, **options) for m in (model, truth))
    assert torch.equal(said.sequences, true.sequences)
    found, wanted = (torch.stack(out.logits).float().log_softmax(-1) for out in (said, true))
    assert (found - wanted).abs().max() < TOLERANCE


def test_generate_reads_a_prompt_in_chunks(model: Any):
    ids = prompts(LENGTH)
    assert torch.equal(generate(model, ids, 4, prefill_chunk_size=256), generate(model, ids, 4))


def test_padding_that_comes_last(model: Any):
    long, short = prompts(LENGTH)[0], prompts(600)[0]
    ids = torch.stack([long, torch.cat([short, torch.zeros(LENGTH - 600, dtype=torch.long)])])
    mask = (torch.arange(LENGTH) < torch.tensor([[LENGTH], [600]])).long()
    found = logprobs(model, ids, attention_mask=mask)
    assert (found[0] - logprobs(model, long[None])[0]).abs().max() < TOLERANCE
    assert (found[1, :600] - logprobs(model, short[None])[0]).abs().max() < TOLERANCE


def test_bf16_is_as_close_as_eager(tiny: Path, truth: Any):
    register()
    ids = prompts(600)
    ours, eager = (logprobs(oracle.load(tiny, torch.bfloat16, name), ids) for name in ("msa", "eager"))
    wanted = logprobs(truth, ids)
    assert (ours - wanted).abs().mean() < 1.5 * (eager - wanted).abs().mean()


def test_an_image(tiny: Path, model: Any, truth: Any):
    pytest.importorskip("torchvision", reason="the processor of transformers' MiniMax-M3 needs it")
    prompt = Prompt(f"What{IMAGE} is it?", [picture(224, 280, 1)])
    found, wanted = (Reader(tiny, m).logprobs(prompt) for m in (model, truth))
    assert (found - wanted).abs().max() < TOLERANCE


def left_padded(model: Any) -> None:
    logprobs(model, prompts(300), attention_mask=(torch.arange(300) > 7).long()[None])


def after_padding(model: Any) -> None:
    ids = torch.cat([prompts(300), prompts(300)])
    mask = (torch.arange(300) < torch.tensor([[300], [200]])).long()
    generate(model, ids, 3, attention_mask=mask)


def packed(model: Any) -> None:
    positions = torch.cat([torch.arange(150), torch.arange(150)])[None]
    logprobs(model, prompts(300), position_ids=positions, use_cache=False)


def own_mask(model: Any) -> None:
    logprobs(model, prompts(300), attention_mask=torch.ones(1, 1, 300, 300, dtype=torch.bool))


def static_cache(model: Any) -> None:
    generate(model, prompts(300), 3, cache_implementation="static")


def gradients(model: Any) -> None:
    model(input_ids=prompts(300))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (left_padded, "attention_mask hides tokens before others"),
        (after_padding, "attention_mask hides tokens before others"),
        (packed, "the rows hold several sequences"),
        (own_mask, "the attention mask has 4 dimensions"),
        (static_cache, "the cache is static"),
        (gradients, "gradients are on"),
    ],
)
def test_refusals(call: Callable[[Any], None], sentence: str, model: Any):
    with pytest.raises(MSAError, match=sentence):
        call(model)


def test_another_model_is_refused(llama: Path):
    from transformers import AutoModelForCausalLM, LlamaConfig

    register()
    config = LlamaConfig.from_pretrained(llama)
    other = AutoModelForCausalLM.from_config(config, attn_implementation="msa")
    with pytest.raises(MSAError, match="type llama, which has no MSA layers"):
        other(input_ids=torch.arange(4)[None])


def test_another_device_is_refused(monkeypatch: pytest.MonkeyPatch):
    from transformers import AttentionInterface

    register()
    attend = AttentionInterface()["msa"]
    query = torch.empty(1, 2, 3, 128, device="meta")
    with pytest.raises(MSAError, match="on meta, but msa-backend is tested with transformers on a CPU only"):
        attend(object(), query, query, query, None, scaling=1.0)
    monkeypatch.setenv("MSA_ALLOW_UNTESTED", "1")
    out, _ = attend(torch.nn.Module(), query, query, query, None, scaling=1.0)  # the vision tower's, by sdpa
    assert out.shape == (1, 3, 2, 128)
