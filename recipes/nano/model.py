"""The text model, written for training: whole sequences, experts computed all, block selection as a mask.

What it computes is what `transformers`' MiniMax-M3 computes (`tests/recipes` compares the logits), under the names of
the original checkpoint. Attention is `scaled_dot_product_attention`: dense, or with the mask of the chosen blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msa_backend.config import BLOCK_SIZE, HEAD_DIM
from msa_backend.tiny import TinyShape
from msa_backend.tiny.tokenizer import vocab_size

SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0
NEAR = 64
"""Tokens this near are never handicapped by `Reading.far_handicap`."""

ROWS_AT_ONCE = 1024
"""Queries whose scores are in memory at a time."""

Score = Callable[[Tensor], Tensor]


@dataclass
class Reading:
    """How a forward pass attends, and what it notes on the way.

    Attributes:
        block: tokens of a block.
        topk: blocks that a query token attends to; None: all of them, densely.
        far_handicap: added in dense layers to the logits of keys farther away than ``NEAR``. The logarithm of ``n``
            makes each such key count as ``n`` do, so that a short text weighs as much as a long one.
        rows: ``[batch, n]`` query positions at which the indexer is taught; None: nowhere.
        damage: changes block scores ``[batch, heads, queries, blocks]`` before the choice, to break it on purpose.
        lessons: the loss of the indexer of each sparse layer.
        recalls: of each sparse layer, the share of the dense attention on blocks other than the newest that the
            choice of ``topk`` (or 16) of them holds.
        loads: of each mixture of experts, the share of the tokens that chose each expert.
    """

    block: int = BLOCK_SIZE
    topk: int | None = None
    far_handicap: float = 0.0
    rows: Tensor | None = None
    damage: Score | None = None
    lessons: list[Tensor] = field(default_factory=list)
    recalls: list[Tensor] = field(default_factory=list)
    loads: list[Tensor] = field(default_factory=list)


class Norm(nn.Module):
    """RMS norm that scales by ``weight + 1``, in fp32."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], 1 + self.weight, 1e-6).to(x.dtype)


def rotation(positions: Tensor, shape: TinyShape) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[batch, 1, tokens, rotary_dim / 2]`` in fp32."""
    channels = torch.arange(0, shape.rotary_dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions[:, None, :, None].float() * shape.rope_theta ** (-channels / shape.rotary_dim)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = (part.to(x.dtype) for part in turn)
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), -1)


class Attention(nn.Module):
    def __init__(self, shape: TinyShape, sparse: bool) -> None:
        super().__init__()
        self.shape, self.sparse = shape, sparse
        width, narrow = shape.heads * HEAD_DIM, shape.kv_heads * HEAD_DIM
        self.q_proj = nn.Linear(shape.hidden, width, bias=False)
        self.k_proj = nn.Linear(shape.hidden, narrow, bias=False)
        self.v_proj = nn.Linear(shape.hidden, narrow, bias=False)
        self.o_proj = nn.Linear(width, shape.hidden, bias=False)
        self.q_norm, self.k_norm = Norm(HEAD_DIM), Norm(HEAD_DIM)
        if sparse:
            self.index_q_proj = nn.Linear(shape.hidden, narrow, bias=False)
            self.index_k_proj = nn.Linear(shape.hidden, HEAD_DIM, bias=False)
            self.index_q_norm, self.index_k_norm = Norm(HEAD_DIM), Norm(HEAD_DIM)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], reading: Reading) -> Tensor:
        q, k, v = (_heads(part) for part in (self.q_proj(x), self.k_proj(x), self.v_proj(x)))
        q, k = rotate(self.q_norm(q), turn), rotate(self.k_norm(k), turn)
        mask = None
        if self.sparse:
            # The indexer learns from its own lesson alone, and teaches the rest of the model nothing.
            seen = x.detach()
            index_q = rotate(self.index_q_norm(_heads(self.index_q_proj(seen))), turn)
            index_k = rotate(self.index_k_norm(_heads(self.index_k_proj(seen))), turn)
            if reading.rows is not None:
                lesson, recall = indexer_lesson(q.detach(), k.detach(), index_q, index_k, reading)
                reading.lessons.append(lesson)
                reading.recalls.append(recall)
            if reading.topk is not None:
                mask = choice_mask(index_q, index_k, reading)
        elif reading.far_handicap:
            mask = handicap_mask(q, reading.far_handicap)
        return self.o_proj(attend(q, k, v, mask).transpose(1, 2).flatten(2))


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Causal attention ``[batch, heads, tokens, dim]``.

    Args:
        mask: ``[any, 1 or kv heads, tokens, tokens]``, added to the logits; causal itself.
    """
    group = q.shape[1] // k.shape[1]
    k, v = (x[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2) for x in (k, v))
    if mask is not None:
        mask = mask.expand(q.shape[0], -1, -1, -1)
        mask = mask.expand(-1, q.shape[1], -1, -1) if mask.shape[1] == 1 else mask.repeat_interleave(group, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def handicap_mask(q: Tensor, handicap: float) -> Tensor:
    """``[1, 1, tokens, tokens]``: 0 for the own and the near keys, the handicap for far ones, -inf for later ones."""
    places = torch.arange(q.shape[2], device=q.device, dtype=torch.int32)
    mask = _aligned(q, (1, 1, len(places), len(places)))
    for rows in places.split(ROWS_AT_ONCE):
        behind = rows[:, None] - places
        part = mask[0, 0, rows].zero_().masked_fill_(behind > NEAR, handicap).masked_fill_(behind < 0, -torch.inf)
        mask[0, 0, rows] = part
    return mask


def _aligned(like: Tensor, size: tuple[int, ...]) -> Tensor:
    """-inf of this size, its rows so far apart as attention with a mask wants them; it would copy it for every head."""
    return like.new_full((*size[:-1], -(-size[-1] // 16) * 16), -torch.inf)[..., : size[-1]]


def block_scores(logits: Tensor, block: int) -> Tensor:
    """``[..., keys]`` to the largest of each block ``[..., blocks]``."""
    return F.pad(logits, (0, -logits.shape[-1] % block), value=-torch.inf).unflatten(-1, (-1, block)).amax(-1)


@torch.no_grad()
def choice_mask(index_q: Tensor, index_k: Tensor, reading: Reading) -> Tensor | None:
    """``[batch, kv heads, tokens, tokens]``: 0 where a query attends, -inf elsewhere; None if everywhere causal."""
    tokens, block, topk = index_k.shape[2], reading.block, reading.topk
    blocks = -(-tokens // block)
    if topk is None or blocks <= topk:
        return None
    places, numbers = torch.arange(tokens, device=index_k.device), torch.arange(blocks, device=index_k.device)
    mask = _aligned(index_q, (*index_q.shape[:2], tokens, tokens))
    for rows in places.split(ROWS_AT_ONCE):
        future, own = rows[:, None] < places, (rows // block)[:, None]
        with torch.autocast(index_q.device.type, enabled=False):
            logits = index_q[:, :, rows].float() @ index_k.float().transpose(-1, -2)
        scores = block_scores(logits.masked_fill_(future, -torch.inf), block)
        if reading.damage is not None:
            scores = reading.damage(scores)
        scores = scores.masked_fill(own == numbers, torch.inf).masked_fill(own < numbers, -torch.inf)
        chosen = torch.full_like(scores, -torch.inf, dtype=mask.dtype)
        chosen.scatter_(-1, scores.topk(topk, -1).indices, 0.0)
        mask[:, :, rows] = chosen.repeat_interleave(block, -1)[..., :tokens].masked_fill_(future, -torch.inf)
    return mask


def indexer_lesson(q: Tensor, k: Tensor, index_q: Tensor, index_k: Tensor, reading: Reading) -> tuple[Tensor, Tensor]:
    """The cross entropy of block scores to the dense attention on blocks, at ``reading.rows``, and what a choice holds.

    The attention of a group's heads is summed, and summed over each block; the newest block, which is taken whatever
    it scores, is left out on both sides. Its gradient is that of the KL divergence.
    """
    assert reading.rows is not None
    rows, tokens, block = reading.rows, k.shape[2], reading.block
    own = (rows // block)[:, None, :, None]
    blocks = torch.arange(-(-tokens // block), device=q.device)
    future = rows[:, None, :, None] < torch.arange(tokens, device=q.device)
    with torch.no_grad():
        chosen = _at(q, rows).unflatten(1, (k.shape[1], -1))
        logits = torch.einsum("bhgnd,bhtd->bhgnt", chosen, k).float() * HEAD_DIM**-0.5
        attention = logits.masked_fill_(future[:, :, None], -torch.inf).softmax(-1).mean(2)
        teacher = F.pad(attention, (0, -tokens % block)).unflatten(-1, (-1, block)).sum(-1)
        teacher = teacher.masked_fill(blocks >= own, 0.0)
    logits = (_at(index_q, rows) @ index_k.transpose(-1, -2)).float() * HEAD_DIM**-0.5
    scores = block_scores(logits.masked_fill(future, -torch.inf), block).masked_fill(blocks >= own, -1e4)
    lesson = -(teacher * scores.log_softmax(-1)).sum(-1).mean()
    with torch.no_grad():
        others = min((reading.topk or 16) - 1, scores.shape[-1])
        held = teacher.gather(-1, scores.topk(others, -1).indices).sum()
        recall = held / teacher.sum().clamp(min=1e-6)
    return lesson, recall


def _at(x: Tensor, rows: Tensor) -> Tensor:
    return x.gather(2, rows[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


class DenseMLP(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(hidden, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.clamp(max=SWIGLU_LIMIT), up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
    return (up + 1) * gate * torch.sigmoid(SWIGLU_ALPHA * gate)


class Mixture(nn.Module):
    """All experts are computed for all tokens: they are few and small, and nothing has to be sorted."""

    def __init__(self, shape: TinyShape) -> None:
        super().__init__()
        self.shape = shape
        self.gate = nn.Linear(shape.hidden, shape.experts, bias=False)
        self.register_buffer("e_score_correction_bias", torch.zeros(shape.experts))
        inner = shape.experts * shape.expert_size
        self.w1, self.w3 = (nn.Linear(shape.hidden, inner, bias=False) for _ in range(2))
        self.w2 = nn.Linear(inner, shape.hidden, bias=False)
        self.shared_experts = DenseMLP(shape.hidden, shape.expert_size)

    def forward(self, x: Tensor, reading: Reading) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            scores = torch.sigmoid(x.float() @ self.gate.weight.T)
        chosen = (scores + self.e_score_correction_bias).topk(self.shape.experts_per_token, -1).indices
        taken = torch.zeros_like(scores).scatter_(-1, chosen, 1.0)
        reading.loads.append(taken.detach().flatten(0, -2).mean(0))
        weights = scores * taken
        weights = weights / weights.sum(-1, keepdim=True) * self.shape.routed_scaling
        inner = swiglu(self.w1(x), self.w3(x)).unflatten(-1, (self.shape.experts, -1))
        return self.w2((inner * weights[..., None].to(inner.dtype)).flatten(-2)) + self.shared_experts(x)


class Layer(nn.Module):
    def __init__(self, shape: TinyShape, layer: int) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(shape.hidden), Norm(shape.hidden)
        self.self_attn = Attention(shape, shape.sparse_attention[layer])
        self.mlp = Mixture(shape) if shape.moe[layer] else DenseMLP(shape.hidden, shape.dense_size)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], reading: Reading) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), turn, reading)
        inside = self.post_attention_layernorm(x)
        return x + (self.mlp(inside, reading) if isinstance(self.mlp, Mixture) else self.mlp(inside))


class Nano(nn.Module):
    def __init__(self, shape: TinyShape) -> None:
        super().__init__()
        self.shape = shape
        vocabulary = vocab_size(shape.words)
        self.embed_tokens = nn.Embedding(vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape, layer) for layer in range(shape.layers))
        self.norm = Norm(shape.hidden)
        self.lm_head = nn.Linear(shape.hidden, vocabulary, bias=False)

    def forward(self, tokens: Tensor, reading: Reading, positions: Tensor | None = None) -> Tensor:
        """Hidden states ``[batch, tokens, hidden]`` for `lm_head`.

        Args:
            tokens: ``[batch, tokens]``.
            positions: of the tokens in the text, ``[batch, tokens]``, ascending; None: 0, 1, 2, ...
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        turn = rotation(positions, self.shape)
        x = self.embed_tokens(tokens)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # as an engine keeps it
        for layer in self.layers:
            x = layer(x, turn, reading)
        return self.norm(x)
