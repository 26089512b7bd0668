"""Means over the measured query tokens, for every layer and KV group, gathered chunk by chunk."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from msa_backend.bench.locality import NEIGHBOURS, distinct
from msa_backend.transformers import dense

from .forward import Seen
from .maps import Map
from .plan import Plan
from .selectors import Blocks, Rows, by_block, captured, recalls

Name = tuple[Any, ...]


class Means:
    """Means of values that come some at a time."""

    def __init__(self) -> None:
        self.sums: dict[Name, Tensor] = {}
        self.counts: dict[Name, int] = defaultdict(int)

    def add(self, name: Name, values: Tensor) -> None:
        """
        Args:
            values: ``[num_kv_heads, n]``, any dtype.
        """
        total = values.double().sum(1).cpu()
        self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.counts[name] += values.shape[1]

    def get(self, name: Name, group: int) -> float | None:
        """None where nothing came."""
        return float(self.sums[name][group]) / self.counts[name] if self.counts.get(name) else None


class Measures:
    """
    Attributes:
        means: by layer and name.
        maps: by layer.
        chosen: by layer, ``[num_kv_heads, n, topk]`` int32 of the measured queries of each chunk.
        shared: ``[num_kv_heads, layers, layers]`` fp64: blocks that a query chose in both, as a share of top-k.
    """

    def __init__(self, plan: Plan, num_kv_heads: int) -> None:
        self.plan, self.num_kv_heads = plan, num_kv_heads
        self.means = Means()
        self.maps = {layer: Map(plan.num_tokens, plan.block_size, num_kv_heads) for layer in plan.layers}
        self.queries = torch.tensor(plan.queries)
        self._last = set(plan.queries[-NEIGHBOURS:])
        self._in_both = torch.zeros(num_kv_heads, len(plan.layers), len(plan.layers), dtype=torch.float64)
        self.chosen: dict[int, list[Tensor]] = {layer: [] for layer in plan.layers}

    def observe(self, layer: int, seen: Seen) -> None:
        """Take a chunk of one layer, as :data:`.forward.Observe`."""
        if layer not in self.maps:
            return
        seq_len, new = seen.k.shape[1], seen.q.shape[1]
        positions = torch.arange(seq_len - new, seq_len, device=seen.q.device)
        self.maps[layer].add(positions, seen.block_ids)
        measured = self.queries[(self.queries >= seq_len - new) & (self.queries < seq_len)].to(positions.device)
        if not len(measured):
            return
        at = measured - (seq_len - new)
        chosen = seen.block_ids[:, at]
        k, index_k = seen.k.float(), seen.index_k.float()
        for tile in dense.tiles(len(at), seen.q.shape[0], seq_len):
            rows = read_rows(seen, k, index_k, at[tile], measured[tile])
            self._add_recalls(layer, rows)
            self._add_choice(layer, rows, chosen[:, tile])
        self.chosen[layer].append(chosen.cpu())
        if layer == self.plan.layers[-1]:
            self._compare_layers()

    def blocks(self, layer: int) -> Tensor:
        """``[num_kv_heads, n, topk]`` int32 that the measured queries chose."""
        return torch.cat(self.chosen[layer], 1)

    def distinct(self, layer: int) -> list[float]:
        """By KV head, how many different blocks four neighbours chose together, on average."""
        groups = self.blocks(layer).unflatten(1, (-1, NEIGHBOURS)).flatten(2)
        return distinct(groups).double().mean(1).tolist()

    @property
    def shared(self) -> Tensor:
        return self._in_both / (len(self.queries) * self.plan.selection.topk)

    def _add_recalls(self, layer: int, rows: Rows) -> None:
        for block_size, selection in self.plan.sweep:
            wanted = rows.positions // block_size >= selection.topk
            if not wanted.any():
                continue
            some = rows if wanted.all() else rows.of(wanted)
            for name, values in recalls(some, by_block(some, block_size), block_size, selection).items():
                self.means.add((layer, "sweep", block_size, selection.topk, name), values)

    def _add_choice(self, layer: int, rows: Rows, chosen: Tensor) -> None:
        """What the model itself chose, ``[num_kv_heads, n, topk]``, beside what others would have."""
        plan = self.plan
        blocks = by_block(rows, plan.block_size)
        found = recalls(rows, blocks, plan.block_size, plan.selection)
        found["msa"] = captured(blocks.mass, chosen)
        for name, values in found.items():
            self.means.add((layer, "recall", name), values)
        last = torch.tensor([position in self._last for position in rows.positions.tolist()], device=chosen.device)
        for place, ids, sees in places(plan, blocks, rows.positions):
            mass = captured(blocks.mass, ids.expand(len(blocks.mass), -1, -1))
            taken = (ids[:, :, None] == chosen[:, :, None]).any(-1).float().mean(-1)
            for when, which in (("all", sees), ("last", sees & last)):
                self.means.add((layer, "mass", place, when), mass[:, which])
                self.means.add((layer, "chosen", place, when), taken[:, which])

    def _compare_layers(self) -> None:
        """The choices of all layers in the newest chunk."""
        ids = torch.stack([of_layer[-1] for of_layer in self.chosen.values()], 1).long()
        hot = torch.zeros(*ids.shape[:-1], int(ids.max()) + 1).scatter_(-1, ids, 1.0).flatten(2)
        self._in_both += torch.bmm(hot, hot.mT)


def read_rows(seen: Seen, k: Tensor, index_k: Tensor, at: Tensor, positions: Tensor) -> Rows:
    """
    Args:
        k, index_k: of ``seen`` in fp32.
        at: ``[n]`` which of the new tokens.
        positions: ``[n]`` of the same in the sequence.
    """
    q = seen.q[:, at]
    index_scores = seen.index_q[:, at].float() @ index_k.T
    return Rows(
        positions,
        dense.probabilities(q, k, positions, seen.scale).mean(1),
        index_scores.masked_fill_(dense.unseen(positions, k.shape[1]), -torch.inf),
        q.float().unflatten(0, (k.shape[0], -1)).mean(1),
        k,
    )


def places(plan: Plan, blocks: Blocks, positions: Tensor) -> list[tuple[str, Tensor, Tensor]]:
    """Blocks to look at: names, ids ``[n, any]``, and whether a query is asked at all, ``[n]`` bool."""
    own = blocks.own[:, None]
    every = torch.ones_like(positions, dtype=torch.bool)
    local = torch.arange(plan.selection.local_blocks, device=own.device)
    found = [("first", torch.zeros_like(own), every), ("local", own - local, every)]
    if plan.target is not None:
        begin, end = plan.target
        ids = torch.arange(begin // plan.block_size, (end - 1) // plan.block_size + 1, device=own.device)
        # Queries before its end see no or only half of it.
        found.append(("target", ids.expand(len(own), -1).minimum(own), positions >= end))
    return found
