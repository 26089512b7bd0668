"""What is measured: one case is one sparse layer's attention for one batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

BLOCK_SIZE = 128
MODES = ("prefill", "suffix", "decode", "verify")
# New tokens of each sequence where none are asked for.
NEW_TOKENS = {"prefill": 8192, "suffix": 256, "decode": 1, "verify": 4}
CALIBRATED = "calibrated"
RANDOM = "random"
K = 1024
BOUNDS = (1024 * K, 128 * K)
"""What servers of MiniMax-M3 capture their CUDA graphs for: ``max_model_len``."""


@dataclass(frozen=True)
class Case:
    """A batch of sequences with new tokens at their ends.

    Attributes:
        mode: one of :data:`MODES`. Decode and verify are timed as replays of a CUDA graph, as engines run them.
        context: tokens in each sequence, the new ones counted; of verify, on average.
        batch: sequences.
        new_tokens: query tokens of each sequence.
        num_heads, num_kv_heads, dim: of the attention; there are as many index heads as KV heads.
        dtype: of the queries, and of both caches unless they are fp8.
        fp8_index, fp8_kv: index keys, or keys and values, stored as e4m3. With e4m3 index keys there are index queries
            in e4m3 too, as the engines' fused writes make them.
        locality: the cosine between index queries of neighbouring tokens, 0 for random ones; or :data:`CALIBRATED`,
            such that they choose alike as far as the real model's do, see :mod:`msa_backend.bench.locality`.
        bound: tokens that decode or verify is captured for, whatever it runs at, as a server captures for its
            ``max_model_len``; 0 for the longest sequence here.
    """

    mode: str
    context: int
    batch: int = 1
    new_tokens: int = 1
    num_heads: int = 64
    num_kv_heads: int = 4
    dim: int = 128
    topk: int = 16
    dtype: str = "bf16"
    fp8_index: bool = False
    fp8_kv: bool = False
    locality: float | str = CALIBRATED
    bound: int = 0

    @property
    def in_graph(self) -> bool:
        return self.mode in ("decode", "verify")

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence. Drafts come from requests of all ages: lengths from half the mean to 1.5 times."""
        if self.mode != "verify" or self.batch == 1:
            return [self.context] * self.batch
        step = self.context / (self.batch - 1)
        return [max(self.new_tokens, round(self.context / 2 + i * step)) for i in range(self.batch)]

    @property
    def max_seq_len(self) -> int:
        """What the host says no sequence exceeds."""
        return self.bound or max(self.lengths)

    @property
    def num_tokens(self) -> int:
        return self.batch * self.new_tokens

    @property
    def title(self) -> str:
        words = [self.mode, f"{self.new_tokens:,} new @ {self.context:,}"]
        if self.batch > 1:
            words.append(f"x {self.batch}")
        words += [f"{self.num_heads}/{self.num_kv_heads} heads", self.dtype]
        words += ["fp8 index"] * self.fp8_index + ["fp8 KV"] * self.fp8_kv
        words += [self.locality_name] * (self.new_tokens > 1)
        words += [f"captured for {short(self.bound)}"] * (self.bound > 0)
        return ", ".join(words)

    @property
    def locality_name(self) -> str:
        if self.locality == CALIBRATED:
            return CALIBRATED
        return f"cosine {self.locality:g}" if self.locality else RANDOM


def short(tokens: int) -> str:
    """1M, 128K or 1,000."""
    for unit, size in (("M", K * K), ("K", K)):
        if tokens % size == 0:
            return f"{tokens // size}{unit}"
    return f"{tokens:,}"


def capture_for(cases: Iterable[Case], bounds: Sequence[int]) -> Iterator[Case]:
    """Decode and verify once for each of ``bounds`` that holds their sequences, for their own length where none does.

    A bound of 0 is the own length.
    """
    for case in cases:
        longest = max(case.lengths)
        fitting = [bound for bound in bounds if case.in_graph and (bound >= longest or bound == 0)]
        yield from (replace(case, bound=bound) for bound in fitting or [0])


def grid(
    modes: Iterable[str],
    contexts: Iterable[int],
    batches: Iterable[int],
    heads: Iterable[tuple[int, int]],
    new_tokens: int | None,
    base: Case,
) -> Iterator[Case]:
    """Every combination, but none with more new tokens than context: there the new tokens are the whole sequence."""
    for mode, (num_heads, num_kv_heads), batch, context in product(modes, heads, batches, contexts):
        yield replace(
            base,
            mode=mode,
            context=context,
            batch=batch,
            new_tokens=min(new_tokens or NEW_TOKENS[mode], context),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
        )


def release() -> Iterator[Case]:
    """The released model's shape, whole and as one rank of four, in what serving consists of.

    As many as ours, in-tree and FA3 are hoped to do in four minutes on an H200.
    """

    def one_rank(case: Case) -> Case:
        return replace(case, num_heads=16, num_kv_heads=1)

    for context in (8 * K, 32 * K, 128 * K, 512 * K, 1024 * K):
        yield Case("prefill", context, new_tokens=8192)
    for context in (128 * K, 1024 * K):
        yield one_rank(Case("prefill", context, new_tokens=8192))
    yield Case("prefill", 1024 * K, new_tokens=8192, fp8_index=True)
    yield Case("prefill", 128 * K, new_tokens=8192, locality=0.0)
    for new_tokens, context in ((182, 17_718), (171, 55_339), (338, 74_578), (347, 131_547), (1623, 18_007)):
        yield Case("suffix", context, new_tokens=new_tokens)
    yield Case("suffix", 55_339, new_tokens=171, locality=0.0)
    for context, batch in ((8, 1), (32, 8), (128, 1), (128, 32), (1024, 1), (1024, 8)):
        yield Case("decode", context * K, batch)
    for context, batch in ((1024, 1), (1024, 8), (128, 64)):
        yield one_rank(Case("decode", context * K, batch))
    for context, batch in ((8, 1), (128, 32), (1024, 1), (1024, 8)):
        yield Case("decode", context * K, batch, fp8_index=True)
    # Drafts to verify: the shapes that flashinfer-ai/flashinfer 4567 asks for, and two short ones.
    for context, batch in product((8 * K, 100_000, 200_000), (16, 64, 256)):
        yield Case("verify", context, batch, new_tokens=4)
    for context, batch in ((8 * K, 64), (8 * K, 256), (100_000, 64), (200_000, 64)):
        yield Case("verify", context, batch, new_tokens=4, fp8_index=True, fp8_kv=True)
    for context in (8 * K, 100_000):
        yield one_rank(Case("verify", context, 64, new_tokens=4))
    yield Case("verify", 8 * K, 64, new_tokens=4, locality=0.0)
    for new_tokens, context in product((2, 8), (8 * K, 100_000)):
        yield Case("verify", context, 64, new_tokens=new_tokens)
    for context in (1000, 5000):
        yield Case("verify", context, 64, new_tokens=8)


def small() -> Iterator[Case]:
    """What a CPU does in seconds."""
    for case in (
        Case("prefill", 1024, new_tokens=256),
        Case("suffix", 2000, new_tokens=33),
        Case("decode", 2048, 4),
        Case("verify", 1000, 4, new_tokens=4),
    ):
        yield replace(case, num_heads=8, num_kv_heads=2, dim=32, topk=4, dtype="fp32")


def host() -> Iterator[Case]:
    """What the host's time is measured for: steps that no full CUDA graph holds, and decode when it runs eagerly."""
    for context in (4 * K, 32 * K, 128 * K):
        yield Case("suffix", context, new_tokens=171)
    yield Case("prefill", 16 * K, new_tokens=2048)
    yield Case("decode", 8 * K, 1)
    yield Case("decode", 32 * K, 8)
    yield Case("verify", 16 * K, 8, new_tokens=8)


PRESETS = {"release": release, "small": small, "host": host}
