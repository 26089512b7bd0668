"""The truth that served models are compared with: MiniMax-M3 as ``transformers`` implements it.

Nothing of this project is in here, so that an error of ours cannot hide in its own reference.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

# How far a fp32 log-probability may lie from this reference. Two correct fp32 implementations differ by the order
# in which they add: on the tiny checkpoint that moves a log-probability by up to 1e-5 (`tiny/test_oracle.py` measures
# it for other chunkings and for another attention kernel), so twenty times as much is granted. Dense attention, one
# block more or fewer, or one dropped block in one layer moves the distribution after every token by at least 0.2,
# a thousand times the tolerance (`tiny/test_selection_matters.py` asks for twenty), so nothing wrong fits in.
LOGPROB_TOLERANCE = 2e-4

CHUNK = 512


@dataclass(frozen=True)
class Greedy:
    """A greedy continuation.

    Attributes:
        tokens: the tokens, in order.
        logprobs: the log-probability of each.
        margins: by how much each beat the second best; a small one may fall either way in lower precision.
    """

    tokens: list[int]
    logprobs: list[float]
    margins: list[float]


@dataclass(frozen=True)
class CloseCalls:
    """The narrowest discrete decisions of a prompt.

    Rounding turns a decision only if its margin is of the size of the rounding error, about 1e-6 here. If a
    comparison fails at one position alone, look here first.

    Attributes:
        block: smallest gap between the last chosen and the first rejected block, relative to the largest score
            of that query.
        expert: smallest gap between the last chosen and the first rejected expert, in routing score.
    """

    block: float
    expert: float


def random_prompt(length: int, seed: int = 0, vocab: int = 1200) -> list[int]:
    """Token ids that no text would give; of the tiny tokenizer, the first 1,200 ids are bytes and words."""
    numbers = random.Random(f"{length}:{seed}")
    return [numbers.randrange(vocab) for _ in range(length)]


def load(directory: str | Path, dtype: torch.dtype = torch.float32, attention: str = "eager") -> Any:
    """Load a checkpoint of any form, refusing one with missing or unexpected tensors.

    ``from_pretrained(dtype=...)`` leaves the rotary frequencies in fp32; ``model.to(torch.bfloat16)`` would not, and
    would change tokens. The router is kept in fp32 in bf16 too, because the released checkpoint stores it so.
    """
    from transformers import MiniMaxM3SparseForConditionalGeneration

    model, info = MiniMaxM3SparseForConditionalGeneration.from_pretrained(
        directory, dtype=dtype, attn_implementation=attention, local_files_only=True, output_loading_info=True
    )
    problems = {kind: sorted(found) for kind, found in info.items() if found}
    if problems:
        raise AssertionError(f"{directory} does not match the architecture: {problems}")
    for layer in text_layers(model):
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.float()
    return model.eval()


def text_layers(model: Any) -> list[Any]:
    """The decoder layers."""
    return list(model.model.language_model.layers)


def prompt_logprobs(model: Any, ids: list[int], chunk: int = CHUNK) -> torch.Tensor:
    """Log-probability of each prompt token but the first, fp32 ``[len(ids) - 1]``."""
    targets = torch.tensor(ids[1:])
    parts = []
    for start, logits in _forward(model, ids, chunk):
        part = targets[start : start + len(logits)]
        parts.append(logits[: len(part)].log_softmax(-1).gather(1, part[:, None])[:, 0])
    return torch.cat(parts)


def logprobs(model: Any, ids: list[int], positions: list[int] | None = None, chunk: int = CHUNK) -> torch.Tensor:
    """All log-probabilities after the tokens at ``positions`` (the last by default), fp32 ``[positions, vocab]``."""
    wanted = [len(ids) - 1] if positions is None else positions
    rows = {}
    for start, logits in _forward(model, ids, chunk):
        rows |= {at: logits[at - start].log_softmax(-1) for at in wanted if start <= at < start + len(logits)}
    return torch.stack([rows[at] for at in wanted])


def greedy(model: Any, ids: list[int], count: int, chunk: int = CHUNK) -> Greedy:
    """Continue ``ids`` by the ``count`` most probable tokens; an end-of-sequence token does not stop it."""
    cache = new_cache(model)
    *_, (_, logits) = _forward(model, ids, chunk, cache)
    result = Greedy([], [], [])
    while True:
        (best, second), (token, _) = (found.tolist() for found in logits[-1].log_softmax(-1).topk(2))
        result.tokens.append(token)
        result.logprobs.append(best)
        result.margins.append(best - second)
        if len(result.tokens) == count:
            return result
        ((_, logits),) = _forward(model, [token], 1, cache)


def close_calls(model: Any, ids: list[int], chunk: int = CHUNK) -> CloseCalls:
    """How narrow the narrowest choice of a block and of an expert is while ``ids`` are read."""
    watch = _WatchTopk()
    with watch:
        for _ in _forward(model, ids, chunk):
            pass
    return CloseCalls(block=watch.block, expert=watch.expert)


@contextlib.contextmanager
def altered_selection(
    model: Any, change: Callable[[torch.Tensor], torch.Tensor], layers: list[int] | None = None
) -> Iterator[None]:
    """Within this context, sparse layers attend to ``change(block_ids)`` instead of the blocks they chose.

    ``block_ids`` is ``[batch, kv_heads, tokens, topk]``: the forced blocks first, then by falling score, then -1.
    """
    with contextlib.ExitStack() as hooks:
        for number, layer in enumerate(text_layers(model)):
            if layer.self_attn.indexer is not None and (layers is None or number in layers):
                hooks.enter_context(
                    layer.self_attn.indexer.register_forward_hook(lambda _module, _inputs, ids: change(ids))
                )
        yield


@contextlib.contextmanager
def altered_topk(model: Any, topk: int) -> Iterator[None]:
    """Within this context, sparse layers choose ``topk`` blocks; many enough are dense attention."""
    indexers = [layer.self_attn.indexer for layer in text_layers(model) if layer.self_attn.indexer is not None]
    before = [indexer.topk_blocks for indexer in indexers]
    try:
        for indexer in indexers:
            indexer.topk_blocks = topk
        yield
    finally:
        for indexer, value in zip(indexers, before, strict=True):
            indexer.topk_blocks = value


@contextlib.contextmanager
def rounded_caches(
    dtype: torch.dtype,
    scales: Sequence[tuple[float, float]],
    index_dtype: torch.dtype | None = None,
    truncating: Collection[int] = (),
) -> Iterator[None]:
    """Within this context every layer reads its keys and values as numbers of ``dtype``, fp8, times a scale.

    Args:
        scales: of keys and of values, by layer.
        index_dtype: the same for index keys, unscaled; None: they stay as they are.
        truncating: layers that round towards zero, not to nearest.
    """
    from transformers import DynamicCache
    from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLSparseCacheLayer

    update, update_index = DynamicCache.update, MiniMaxM3VLSparseCacheLayer.update_index

    def rounded(x: torch.Tensor, to: torch.dtype, scale: float, truncate: bool = False) -> torch.Tensor:
        largest = torch.finfo(to).max
        x = (x / scale).clamp(-largest, largest)
        near = x.to(to)
        if truncate:  # the next smaller number has the next smaller code, whatever the sign
            codes = near.view(torch.uint8)
            near = torch.where(near.to(x.dtype).abs() > x.abs(), codes - 1, codes).view(to)
        return near.to(x.dtype) * scale

    def keep(cache: Any, k: torch.Tensor, v: torch.Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
        kept = (rounded(x, dtype, scale, layer in truncating) for x, scale in zip((k, v), scales[layer], strict=True))
        return update(cache, *kept, layer, *args, **kwargs)

    def keep_index(layer: Any, index_k: torch.Tensor) -> torch.Tensor:
        return update_index(layer, index_k if index_dtype is None else rounded(index_k, index_dtype, 1.0))

    with (
        mock.patch.object(DynamicCache, "update", keep),
        mock.patch.object(MiniMaxM3VLSparseCacheLayer, "update_index", keep_index),
    ):
        yield


def new_cache(model: Any) -> Any:
    """An empty KV cache of ``transformers`` for one sequence."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config.get_text_config())


@torch.inference_mode()
def _forward(model: Any, ids: list[int], chunk: int, cache: Any = None) -> Iterator[tuple[int, torch.Tensor]]:
    """Read ``ids`` chunk by chunk; yield where each chunk starts and its fp32 logits ``[tokens, vocab]``.

    The reference builds dense masks and scores of ``[heads, queries, keys]``, 1.1 GB each for 6,000 tokens at once.
    """
    cache = new_cache(model) if cache is None else cache
    for start in range(0, len(ids), chunk):
        part = torch.tensor([ids[start : start + chunk]])
        yield start, model(input_ids=part, past_key_values=cache, use_cache=True).logits[0].float()


class _WatchTopk(TorchFunctionMode):
    """Notes by how much each top-k was decided: block scores are 4-dimensional, routing scores 2-dimensional."""

    def __init__(self) -> None:
        super().__init__()
        self.block = self.expert = float("inf")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.topk, torch.Tensor.topk):
            scores, count = args[0], args[1]
            if count < scores.shape[-1]:
                best = scores.sort(dim=-1, descending=True).values
                gap = best[..., count - 1] - best[..., count]
                if scores.ndim == 4:
                    largest = scores.masked_fill(scores.isinf(), 0).abs().amax(-1)
                    # A rejected block that is not visible yet (-inf) was never a choice.
                    gap = (gap / largest).masked_fill(best[..., count].isinf(), float("inf"))
                    self.block = min(self.block, float(gap.min()))
                else:
                    self.expert = min(self.expert, float(gap.min()))
        return func(*args, **(kwargs or {}))
