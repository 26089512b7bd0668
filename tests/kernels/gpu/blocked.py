"""The definition again, for batches on which :mod:`msa_backend.kernels.reference` takes hours.

Exact in fp64, on the device of the case, for a sample of the query tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from msa_backend.kernels.batch import BLOCK_SIZE

from ..batches import Case

PAGES_AT_A_TIME = 256


def sample_tokens(case: Case, number: int, seed: int) -> Tensor:
    """Some of the query tokens, each row's first and last among them: what is odd is so at the edges."""
    bounds = case.batch.cu_seqlens_q.cpu().long()
    edges = torch.cat((bounds[:-1], bounds[1:] - 1))[(bounds[1:] > bounds[:-1]).repeat(2)]
    rng = torch.Generator().manual_seed(seed)
    others = torch.randint(int(bounds[-1]), (max(0, number - len(edges)),), generator=rng)
    return torch.cat((edges, others)).unique().to(case.q.device)


def row_of(case: Case, tokens: Tensor) -> Tensor:
    return torch.searchsorted(case.batch.cu_seqlens_q[1:].contiguous(), tokens.int(), right=True)


def positions(case: Case, tokens: Tensor) -> Tensor:
    row = row_of(case, tokens)
    return case.batch.context_lens[row] + tokens - case.batch.cu_seqlens_q[row]


def block_scores(case: Case, tokens: Tensor) -> Tensor:
    """``[num_index_heads, len(tokens), max_blocks]`` fp64; -inf where the query sees nothing of the block."""
    row, position = row_of(case, tokens), positions(case, tokens)
    max_blocks = -(-case.batch.max_seq_len // BLOCK_SIZE)
    scores = torch.full((case.index_q.shape[1], len(tokens), max_blocks), -torch.inf, device=tokens.device)
    scores = scores.double()
    for i in row.unique().tolist():
        (of_row,) = torch.where(row == i)
        q = taken(case.index_q, tokens[of_row]).double().transpose(0, 1)
        num_blocks = -(-int(case.batch.seq_lens[i]) // BLOCK_SIZE)
        for start in range(0, num_blocks, PAGES_AT_A_TIME):
            stop = min(start + PAGES_AT_A_TIME, num_blocks)
            pages = case.batch.block_table[i, start:stop].long()
            k = taken(case.caches.index_k_pages, pages).double().flatten(0, 1)
            key_position = torch.arange(start * BLOCK_SIZE, stop * BLOCK_SIZE, device=tokens.device)
            hidden = key_position > position[of_row, None]
            # Summed element by element: a matmul with NaN in its columns may do as it likes with the rest.
            k = k.masked_fill(key_position[:, None] >= case.batch.seq_lens[i], 0)
            dots = (q @ k.T).masked_fill(hidden, -torch.inf)
            scores[:, of_row, start:stop] = dots.unflatten(-1, (-1, BLOCK_SIZE)).amax(-1)
    return scores


def attention(case: Case, tokens: Tensor, block_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The output of some tokens for a selection, and ``sum(p * |v|)``, which rounding errors go by.

    Args:
        block_ids: ``[num_kv_heads, num_tokens, topk]`` of the whole batch.

    Returns:
        Two of ``[len(tokens), num_heads, head_dim]`` fp64.
    """
    num_kv_heads, caches = block_ids.shape[0], case.caches
    row, position = row_of(case, tokens), positions(case, tokens)
    outs, sums = [], []
    within = torch.arange(BLOCK_SIZE, device=tokens.device)
    for head in range(num_kv_heads):
        ids = block_ids[head, tokens].long()
        page = case.batch.block_table[row[:, None], ids.clamp(min=0)].long().masked_fill(ids < 0, 0)
        seen = (ids[..., None] * BLOCK_SIZE + within <= position[:, None, None]) & (ids >= 0)[..., None]
        seen = seen.flatten(1)

        def gathered(pages: Tensor, page: Tensor = page, seen: Tensor = seen, head: int = head) -> Tensor:
            blocks = taken(pages[:, head], page).double().flatten(1, 2)
            return blocks.masked_fill(~seen[..., None], 0)

        k, v = gathered(caches.k_pages) * caches.k_scale, gathered(caches.v_pages) * caches.v_scale
        group = case.q.shape[1] // num_kv_heads
        q = case.q[tokens, head * group : (head + 1) * group].double()
        logits = (q @ k.mT * case.scale).masked_fill(~seen[:, None], -torch.inf)
        weights = logits.softmax(-1).nan_to_num(nan=0)
        outs.append(weights @ v)
        sums.append(weights @ v.abs())
    return torch.cat(outs, 1), torch.cat(sums, 1)


def taken(x: Tensor, index: Tensor) -> Tensor:
    """``x[index]``; fp8 has no indexing, so its bytes are."""
    return x.view(torch.uint8)[index].view(x.dtype) if x.element_size() == 1 else x[index]
