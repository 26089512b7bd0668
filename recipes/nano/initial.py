"""Where training starts: random weights, and a first layer whose heads already look a fixed number of tokens back.

Retrieval is two steps: a token learns what stands before it, and a later one looks for what matches. Gradient descent
finds the first only by way of the second, which takes a small model very long. So the first layer starts with heads
that attend 1, 2, ... tokens back, by rope alone; all of it is trained on.
"""

from __future__ import annotations

import torch

from msa_backend.config import HEAD_DIM
from msa_backend.tiny import TinyShape

from .model import Attention, Nano

ALWAYS = 2.0
"""Of channel 0 of every embedding: what the first layer's queries and keys can be constant by."""
LOOKING_BACK = 0.7
"""The share of the first layer's heads."""
DECAY = 0.82
"""Of a frequency's weight to that of the next higher one, which tells neighbours apart better. So much that among a
million tokens the one looked for gets nearly all of the attention."""
QUIET = 0.1
"""What is left of the random weights there."""
GAIN = 2.4
"""Of its query and key norms each."""


@torch.no_grad()
def initialise(model: Nano, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = model.shape
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        spread = parameter.shape[1] ** -0.5
        if name == "embed_tokens.weight":
            spread = 1.0
        elif name.endswith(("o_proj.weight", "down_proj.weight", "w2.weight")):
            spread *= 0.5
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    model.lm_head.weight.mul_(0.3)
    model.embed_tokens.weight[:, 0] = ALWAYS
    first = model.layers[0].self_attn
    assert isinstance(first, Attention)
    _look_back(first, shape)


def _look_back(attention: Attention, shape: TinyShape) -> None:
    half = shape.rotary_dim // 2
    frequencies = shape.rope_theta ** (-torch.arange(half) / half)
    weights = DECAY ** torch.arange(half)
    weights = (weights / weights.sum()).sqrt() * half**0.5
    keys, queries = attention.k_proj.weight, attention.q_proj.weight
    for head in range(shape.kv_heads):
        rows = keys[head * HEAD_DIM : (head + 1) * HEAD_DIM]
        rows[: 2 * half] *= QUIET
        rows[2 * half :] *= 0.5
        rows[:half, 0] = weights
    group = shape.heads // shape.kv_heads
    for head in range(shape.heads):
        back = head % group + 1
        if back > round(LOOKING_BACK * group):
            continue
        rows = queries[head * HEAD_DIM : (head + 1) * HEAD_DIM]
        rows *= QUIET
        rows[:half, 0] = weights * (frequencies * back).cos()
        rows[half : 2 * half, 0] = -weights * (frequencies * back).sin()
    attention.q_norm.weight.fill_(GAIN - 1)
    attention.k_norm.weight.fill_(GAIN - 1)
