"""What is measured: layers, query tokens, and the settings of the sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from msa_backend.bench.locality import NEIGHBOURS
from msa_backend.config import MSAConfig
from msa_backend.kernels.selection import Selection

from .errors import InspectError


@dataclass(frozen=True)
class Plan:
    """
    Attributes:
        num_tokens: of the prompt.
        layers: sparse ones, ascending.
        block_size, selection: of the model.
        target: tokens to look for, as first and end; None for none.
        queries: positions of the query tokens whose dense attention is computed, ascending: whole groups of four
            neighbours, the last at the end of the prompt.
        sweep: block sizes and selections to compare.
    """

    num_tokens: int
    layers: tuple[int, ...]
    block_size: int
    selection: Selection
    target: tuple[int, int] | None
    queries: tuple[int, ...]
    sweep: tuple[tuple[int, Selection], ...]


def selection_of(msa: MSAConfig) -> Selection:
    return Selection(msa.topk, msa.init_blocks, msa.local_blocks)


def sweep(
    msa: MSAConfig, block_sizes: Sequence[int] | None, topks: Sequence[int] | None
) -> tuple[tuple[int, Selection], ...]:
    """All pairs; by default of half, all and twice what the model has.

    Raises:
        InspectError: a top-k below the forced blocks.
    """
    least = max(1, msa.local_blocks)
    if topks and min(topks) < least:
        raise InspectError(f"--topk has {min(topks)}, but {least} blocks are forced in; start there")
    sizes = block_sizes or (msa.block_size // 2, msa.block_size, msa.block_size * 2)
    topks = topks or (max(least, msa.topk // 2), msa.topk, msa.topk * 2)
    return tuple(
        (size, Selection(topk, local_blocks=msa.local_blocks)) for size in sorted({*sizes}) for topk in sorted({*topks})
    )


def sample(num_tokens: int, block_size: int, selection: Selection, wanted: int) -> tuple[int, ...]:
    """Positions of about ``wanted`` query tokens that see more blocks than they select, evenly, the end included.

    Raises:
        InspectError: there is no such group of four.
    """
    first, offset = selection.topk * block_size, num_tokens % NEIGHBOURS
    begin, end = -((offset - first) // NEIGHBOURS), num_tokens // NEIGHBOURS
    if begin >= end:
        raise InspectError(
            f"the prompt has {num_tokens:,} tokens, of which the first {first:,} select every block they see "
            f"(top-k {selection.topk} of {block_size} tokens), so there is nothing to select; "
            f"use one of {first + NEIGHBOURS:,} or more"
        )
    count = min(end - begin, max(1, wanted // NEIGHBOURS))
    groups = sorted({end - 1 - i * (end - begin) // count for i in range(count)})
    return tuple(offset + group * NEIGHBOURS + i for group in groups for i in range(NEIGHBOURS))
