"""Every metric once more, in fp64, one query and one group at a time, from whole score matrices."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """
    Attributes:
        q: ``[num_heads, seq_len, dim]``.
        k: ``[num_kv_heads, seq_len, dim]``.
        index_q: ``[num_kv_heads, seq_len, dim]``.
        index_k: ``[seq_len, dim]``.
        scale: of the logits.
    """

    q: Tensor
    k: Tensor
    index_q: Tensor
    index_k: Tensor
    scale: float

    @property
    def group(self) -> int:
        return len(self.q) // len(self.k)

    def heads(self, g: int) -> range:
        return range(g * self.group, (g + 1) * self.group)

    def mass(self, g: int, t: int) -> list[float]:
        """Of each token that query ``t`` sees."""
        rows = [(self.k[g, : t + 1] @ self.q[h, t] * self.scale).softmax(0) for h in self.heads(g)]
        return torch.stack(rows).mean(0).tolist()

    def scores(self, g: int, t: int) -> list[float]:
        return (self.index_k[: t + 1] @ self.index_q[g, t]).tolist()


def layer(seed: int, num_tokens: int, num_heads: int = 4, num_kv_heads: int = 2, dim: int = 16) -> Layer:
    rng = torch.Generator().manual_seed(seed)

    def normal(heads: int) -> Tensor:
        return torch.randn(heads, num_tokens, dim, generator=rng, dtype=torch.float64)

    return Layer(normal(num_heads), normal(num_kv_heads), normal(num_kv_heads), normal(1)[0], 0.7)


def tokens_of(block: int, size: int, t: int) -> range:
    return range(block * size, min((block + 1) * size, t + 1))


def best(score: Callable[[int], float], t: int, size: int, topk: int, local: int) -> set[int]:
    """The newest blocks, and of the others those that score best."""
    newest = range(t // size - local + 1, t // size + 1)
    others = sorted((b for b in range(t // size + 1) if b not in newest), key=score, reverse=True)
    return {*newest, *others[: topk - local]}


def msa(of: Layer, g: int, t: int, size: int, topk: int, local: int) -> set[int]:
    scores = of.scores(g, t)
    return best(lambda b: max(scores[s] for s in tokens_of(b, size, t)), t, size, topk, local)


def recalls(of: Layer, g: int, t: int, size: int, topk: int, local: int) -> dict[str, float]:
    mass, scores = of.mass(g, t), of.scores(g, t)
    blocks = range(t // size + 1)
    by_block = [sum(mass[s] for s in tokens_of(b, size, t)) for b in blocks]
    mean_q = sum(of.q[h, t] for h in of.heads(g)) / of.group
    mean_k = [of.k[g, [*tokens_of(b, size, t)]].mean(0) for b in blocks]
    pooled = best(lambda b: float(mean_q @ mean_k[b]), t, size, topk, local)
    ranked = sorted(range(t + 1), key=scores.__getitem__, reverse=True)
    newest = set(blocks[-local:])
    drawn = itertools.combinations(sorted({*blocks} - newest), topk - local)
    return {
        "msa": sum(by_block[b] for b in msa(of, g, t, size, topk, local)),
        "oracle": sum(sorted(by_block, reverse=True)[:topk]),
        "tokens": sum(mass[s] for s in ranked[: topk * size]),
        "pooled": sum(by_block[b] for b in pooled),
        "window": sum(by_block[-topk:]),
        "random": fmean(sum(by_block[b] for b in newest.union(others)) for others in drawn),
    }
