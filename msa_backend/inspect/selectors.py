"""How much of dense attention a selection captures: MSA's own, and others on the same queries and keys.

All choose once for the query heads of a KV head, as MSA does, and all are allowed as many tokens. Heads count alike: a
group's attention is the mean over its heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from msa_backend.kernels.cpu.select_blocks import best_blocks
from msa_backend.kernels.selection import Selection

SELECTORS = {
    "msa": "MSA: the blocks with the largest index score of a token, the newest forced",
    "oracle": "the blocks that hold most attention, which only dense attention knows",
    "tokens": "token top-k, as DSA: the tokens with the largest index scores",
    "pooled": "mean-pooled keys, as MoBA: the blocks whose mean key has the largest product with the group's mean "
    "query, the newest forced",
    "window": "sliding window: the newest blocks",
    "random": "the newest blocks that are forced, and others at random: the expected value",
}


class Rows(NamedTuple):
    """Some query tokens of a sparse layer, and all that they could attend to.

    Attributes:
        positions: ``[n]`` in the sequence.
        mass: ``[num_kv_heads, n, seq_len]`` fp32, dense attention, the mean over the heads of a group.
        index_scores: ``[num_kv_heads, n, seq_len]`` fp32; -inf for tokens that a query does not see.
        q: ``[num_kv_heads, n, head_dim]`` fp32, the mean over the heads of a group.
        k: ``[num_kv_heads, seq_len, head_dim]`` fp32.
    """

    positions: Tensor
    mass: Tensor
    index_scores: Tensor
    q: Tensor
    k: Tensor

    def of(self, wanted: Tensor) -> Rows:
        """Those of the query tokens that ``wanted``, ``[n]`` bool, names."""
        return Rows(
            self.positions[wanted], self.mass[:, wanted], self.index_scores[:, wanted], self.q[:, wanted], self.k
        )


class Blocks(NamedTuple):
    """The same by blocks, of any size.

    Attributes:
        own: ``[n]`` the block of the query itself, the last that it sees.
        mass, index_scores, pooled: ``[num_kv_heads, n, num_blocks]`` fp32: sum, maximum, and product of the mean key.
    """

    own: Tensor
    mass: Tensor
    index_scores: Tensor
    pooled: Tensor


def in_blocks(x: Tensor, block_size: int, fill: float) -> Tensor:
    """Cut the last axis into ``[..., num_blocks, block_size]``, the last block filled up."""
    return pad(x, (0, -x.shape[-1] % block_size), value=fill).unflatten(-1, (-1, block_size))


def by_block(rows: Rows, block_size: int) -> Blocks:
    # The last block may be short and its mean too small, but who sees it stands in it: it is forced, or not seen.
    mean_keys = in_blocks(rows.k.mT, block_size, 0).mean(-1)
    return Blocks(
        rows.positions // block_size,
        in_blocks(rows.mass, block_size, 0).sum(-1),
        in_blocks(rows.index_scores, block_size, -torch.inf).amax(-1),
        torch.bmm(rows.q, mean_keys),
    )


def captured(mass: Tensor, block_ids: Tensor) -> Tensor:
    """``[num_kv_heads, n]``: of ``[num_kv_heads, n, num_blocks]``, what is in the blocks ``[num_kv_heads, n, any]``."""
    return mass.gather(-1, block_ids.long()).sum(-1)


def recalls(rows: Rows, blocks: Blocks, block_size: int, selection: Selection) -> dict[str, Tensor]:
    """Of every selector, the share of dense attention in what it chooses.

    Args:
        rows: all of which see more than ``topk`` blocks.
        blocks: of ``rows``, by ``block_size``.

    Returns:
        ``[num_kv_heads, n]`` fp32 for each of SELECTORS.
    """
    topk, local = selection.topk, selection.local_blocks
    newest = blocks.own[:, None] - torch.arange(topk, device=blocks.own.device)
    newest = newest.expand(len(blocks.mass), -1, -1)
    tokens = rows.index_scores.topk(min(topk * block_size, rows.index_scores.shape[-1]), sorted=False).indices
    forced = captured(blocks.mass, newest[..., :local])
    of_others = (topk - local) / (blocks.own + 1 - local)
    return {
        "msa": captured(blocks.mass, best_blocks(blocks.index_scores, blocks.own, selection)),
        "oracle": blocks.mass.topk(topk, sorted=False).values.sum(-1),
        "tokens": rows.mass.gather(-1, tokens).sum(-1),
        "pooled": captured(blocks.mass, best_blocks(blocks.pooled, blocks.own, selection)),
        "window": captured(blocks.mass, newest),
        "random": forced + of_others * (1 - forced),
    }
