"""Can one-byte index keys choose the very blocks that bf16 keys choose, and does it pay?

Run ``python research/fp8_rescore.py`` (about 90 s on one thread); ``--json FILE`` keeps all numbers. No kernel runs:
shares of blocks are counted on random keys, times follow from rates measured on one H200. research/fp8-index.md says
what came of it.

**Method.** Beside each bf16 key ``k`` a byte a channel is cached, ``k8``, and a bound ``e >= |k - scale * k8|``
(2-norm), rounded up. With ``s8`` the product of a query ``q`` with the rounded key,

    |q . k - s8| <= |q| e,    and with a query that is rounded too, to q8:    <= |q| e + |q - q8| |scale * k8|

(Cauchy-Schwarz), or the sum of the same over groups of channels. So each score lies between ``s8 - width`` and
``s8 + width``. The greatest of these ends over a block's keys are ends for the block's score: ``L <= S <= U``.

1. Score all blocks with the bytes: ``L`` and ``U`` of each.
2. ``T`` = the k-th largest ``L`` (*plain*); or rescore the k blocks with the largest ``s8``, ``T`` = the least of their
   exact scores (*seeded*).
3. Rescore the *candidates*, blocks with ``U >= T``, from their bf16 keys. Choose the k best of them.

**Why the choice is bf16's.** In either case k blocks have ``S >= T``, so the k-th largest ``S`` is at least ``T``. A
block that scores no less than the k-th largest has ``U >= S >= T``: it is a candidate, and so are all that tie with it.
The k best candidates are then k best blocks. Nothing is assumed of the distribution; a bad rounding (saturation, a huge
channel) makes its own key's width large and costs time only.

**Rounding.** A product of ``dim`` terms summed in fp32, in any order, even truncating, is within
``dim * 2**-23 * |q| |k|`` of the exact one. Both sides, ``s8`` and the bf16 score, may be off by as much, so ``e`` has
twice that times ``|k|`` added (:data:`SLACK`, with something for the scales). int8 products are summed exactly. fp8
tensor cores are reported to sum with fewer bits than fp32 has: with them the argument holds only for a larger SLACK,
which no documentation states.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK, DIM, HEADS, TOPK = 128, 128, 4, 16
GROUP = 32
"""Channels of a group, where scales or bounds go by group."""
SLACK = 2 * (DIM + 16) * 2.0**-23
ABOVE = 1 + 2.0**-18
"""Makes up for the rounding of what is computed of norms in fp32."""
TINY = 2.0**-120
CHUNK = 2**14


class Rounding(NamedTuple):
    """How keys become bytes: ``scale`` is one of "one", "key", "block", "group" (32 channels of a key)."""

    dtype: str
    scale: str
    query: bool = False
    """Whether queries are rounded too, each by a scale of its own: needed for one-byte products."""

    @property
    def name(self) -> str:
        return f"{self.dtype} per {self.scale}" if self.scale != "one" else self.dtype


class Bound(NamedTuple):
    """What is stored of the error: a number a key, block, or group of 32 channels of a key."""

    per: str

    @property
    def groups(self) -> int:
        return DIM // GROUP if self.per == "group" else 1


KEY, PER_BLOCK, PER_GROUP = Bound("key"), Bound("block"), Bound("group")
VARIANTS = {
    Rounding("e4m3", "one"): [KEY, PER_BLOCK, PER_GROUP],
    Rounding("e4m3", "group"): [KEY],
    Rounding("e4m3", "one", query=True): [KEY, PER_BLOCK],
    Rounding("int8", "key"): [KEY, PER_BLOCK],
    Rounding("int8", "group"): [KEY],
    Rounding("int8", "key", query=True): [KEY, PER_BLOCK],
    Rounding("int8", "block", query=True): [PER_BLOCK],
    Rounding("e4m3 twice", "one"): [KEY],  # the rounding error rounded as well: two bytes a channel
}


def round_to_bytes(x: Tensor, rounding: Rounding) -> Tensor:
    """``scale * x8`` of ``[n, DIM]`` fp32 numbers, ``n`` a multiple of 128 if the scale is a block's."""
    if rounding.dtype == "e4m3 twice":
        once = round_to_bytes(x, Rounding("e4m3", rounding.scale))
        # 2**-4 is the error of the first rounding relative to its number: the rest fills the format's range as before.
        return once + round_to_bytes((x - once) * 16, Rounding("e4m3", rounding.scale)) / 16
    width = {"one": DIM, "key": DIM, "block": BLOCK * DIM, "group": GROUP}[rounding.scale]
    limit = 448.0 if rounding.dtype == "e4m3" else 127.0
    pieces = x.reshape(-1, width)
    scale = torch.ones(()) if rounding.scale == "one" else (pieces.abs().amax(1, keepdim=True) / limit).clamp(min=TINY)
    codes = (pieces / scale).clamp(-limit, limit)
    codes = codes.to(torch.float8_e4m3fn).float() if rounding.dtype == "e4m3" else codes.round()
    return (codes * scale).view_as(x)


def norms(x: Tensor, groups: int = 1) -> Tensor:
    """2-norms of ``[n, DIM]`` by group of channels, ``[n, groups]`` fp32, never too small."""
    return x.double().unflatten(1, (groups, -1)).norm(dim=2).mul(ABOVE).float()


def up_to_bf16(x: Tensor) -> Tensor:
    """The next number of bf16 that is no less than ``x >= 0``: bounds are stored in two bytes."""
    return ((x.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)


def key_bounds(keys: Tensor, rounded: Tensor, bound: Bound) -> Tensor:
    """``[n, groups]``: an upper bound of the error of each key, with what rounding of sums may add."""
    bounds = norms(keys - rounded, bound.groups) + SLACK * torch.maximum(
        norms(keys, bound.groups), norms(rounded, bound.groups)
    )
    if bound.per == "block":
        bounds = bounds.view(-1, BLOCK, 1).amax(1).repeat_interleave(BLOCK, 0)
    return up_to_bf16(bounds * ABOVE)


def block_max(scores: Tensor) -> Tensor:
    return scores.unflatten(1, (-1, BLOCK)).amax(2)


class Ends(NamedTuple):
    """Of the scores of blocks, each ``[rows, blocks]``."""

    lower: Tensor
    middle: Tensor
    upper: Tensor


def score_ends(q: Tensor, keys: Tensor, rounding: Rounding, bounds: list[Bound]) -> list[Ends]:
    """Score blocks of ``keys [n, DIM]`` with bytes, for queries ``[rows, DIM]`` (bf16's numbers, as fp32)."""
    rounded = round_to_bytes(keys, rounding)
    q8 = round_to_bytes(q, rounding._replace(scale="key")) if rounding.query else q
    s8 = q8 @ rounded.T
    middle = block_max(s8)
    ends = []
    for bound in bounds:
        # |q| e of each group, plus |q - q8| |k8|: one small product gives the width of every score.
        of_query = torch.cat((norms(q, bound.groups), norms(q - q8)), 1) * ABOVE
        of_key = torch.cat((key_bounds(keys, rounded, bound), up_to_bf16(norms(rounded))), 1)
        if bound.per == "block":
            width = of_query @ of_key.view(-1, BLOCK, 2).amax(1).T
            ends.append(Ends(middle - width, middle, middle + width))
        else:
            width = of_query @ of_key.T
            ends.append(Ends(block_max(s8 - width), middle, block_max(s8 + width)))
    return ends


def threshold(ends: Ends, exact: Tensor, topk: int, seeded: bool) -> Tensor:
    """``[rows, 1]``: no more than the k-th largest score. Seeded, it looks at the exact scores of k blocks."""
    known = exact.gather(1, ends.middle.topk(topk).indices) if seeded else ends.lower.topk(topk).values
    return known.amin(1, keepdim=True)


def select(q: Tensor, keys: Tensor, rounding: Rounding, bound: Bound, topk: int, seeded: bool) -> tuple[Tensor, Tensor]:
    """The method as a whole: ``[rows, topk]`` blocks, and ``[rows, blocks]`` which had to be rescored.

    Scores of blocks that the method does not rescore are NaN here: one that mattered would be chosen.
    """
    (ends,) = score_ends(q, keys, rounding, [bound])
    exact = block_max(q.double() @ keys.double().T)
    rescored = ends.upper >= threshold(ends, exact, topk, seeded)
    if seeded:
        rescored = rescored.scatter(1, ends.middle.topk(topk).indices, True)
    known = exact.where(rescored, torch.nan)
    return known.nan_to_num(nan=-torch.inf).topk(topk).indices, rescored


# Keys and queries: heads are normed before they are cached, so all have about the same norm, sqrt(dim).


def normed(x: Tensor) -> Tensor:
    return x * x.square().mean(-1, keepdim=True).rsqrt()


class Source:
    """Keys of a long sequence, piece after piece, and queries ``[tokens * HEADS, DIM]`` over them.

    * gaussian: nothing but noise.
    * heavy: Student's t with 3 degrees of freedom, and channel weights that differ by e (log-normal).
    * clustered: text turns to another of 256 topics every 4 blocks; half the energy of a key is its topic's, and half
      of a query's that of a topic near the start. At 1M a topic has about 32 blocks, of which 16 are chosen.
    * offset: three quarters of a key's energy is the same vector for all, which tells no two blocks apart.
    """

    TOPICS, SEGMENT = 256, 4 * BLOCK
    NAMES = ("gaussian", "heavy", "clustered", "offset")

    def __init__(self, name: str, seed: int) -> None:
        self.name = name
        self.rng = torch.Generator().manual_seed(seed)
        self.weights = self.normal(DIM).exp()
        self.topics = self.normal(self.TOPICS, DIM)
        self.first = torch.randint(self.TOPICS, (16,), generator=self.rng)
        self.segments = 0

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.rng)

    def heavy(self, rows: int) -> Tensor:
        chi = sum(self.normal(rows, DIM).square() for _ in range(3))
        return normed(self.normal(rows, DIM) * (chi / 3).rsqrt())

    def keys(self, num_keys: int) -> Tensor:
        noise = self.heavy(num_keys) * self.weights if self.name == "heavy" else self.normal(num_keys, DIM)
        if self.name == "clustered":
            topic = torch.randint(self.TOPICS, (num_keys // self.SEGMENT,), generator=self.rng)
            if self.segments == 0:
                topic[: len(self.first)] = self.first
            self.segments += len(topic)
            noise = math.sqrt(0.5) * (noise + self.topics[topic].repeat_interleave(self.SEGMENT, 0))
        elif self.name == "offset":
            noise = 0.5 * noise + math.sqrt(0.75) * self.topics[0]
        return as_bf16(noise if self.name == "heavy" else normed(noise))

    def queries(self, tokens: int) -> Tensor:
        rows = tokens * HEADS
        noise = self.heavy(rows) if self.name == "heavy" else self.normal(rows, DIM)
        if self.name == "clustered":
            followed = self.first[torch.randint(len(self.first), (rows,), generator=self.rng)]
            noise = math.sqrt(0.5) * (noise + self.topics[followed])
        return as_bf16(normed(noise))


def as_bf16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def shares(source: Source, contexts: list[int], tokens: int) -> list[dict[str, Any]]:
    """Count candidates: one pass over the longest context, of which the shorter ones are the beginning."""
    q = source.queries(tokens)
    found: dict[tuple[Rounding, Bound], list[Ends]] = {}
    exact_pieces = []
    for start in range(0, max(contexts), CHUNK):
        keys = source.keys(min(CHUNK, max(contexts) - start))
        exact_pieces.append(block_max(q @ keys.T))
        for rounding, bounds in VARIANTS.items():
            for bound, piece in zip(bounds, score_ends(q, keys, rounding, bounds), strict=True):
                found.setdefault((rounding, bound), []).append(piece)
    exact = torch.cat(exact_pieces, 1)
    every = {variant: Ends(*(torch.cat(x, 1) for x in zip(*pieces, strict=True))) for variant, pieces in found.items()}
    return [
        {"keys": source.name, "context": context, **variant_fields(*variant)}
        | count(Ends(*(x[:, : context // BLOCK] for x in ends)), exact[:, : context // BLOCK])
        for context in contexts
        for variant, ends in every.items()
    ]


def variant_fields(rounding: Rounding, bound: Bound) -> dict[str, Any]:
    return {"format": rounding.name, "query": "rounded" if rounding.query else "exact", "bound": bound.per}


def count(ends: Ends, exact: Tensor) -> dict[str, float]:
    """Shares of blocks rescored, for a head (mean, and ``_worst_row``) and for a token's heads together (``_token``);
    and of the chosen blocks that bytes alone miss."""
    best = exact.topk(TOPK).indices
    chosen = torch.zeros_like(exact, dtype=torch.bool).scatter(1, best, True)
    by_bytes = ends.middle.topk(TOPK).indices
    out = {"missed": 1 - chosen.gather(1, by_bytes).float().mean().item()}
    for kind in ("plain", "seeded"):
        rescored = ends.upper >= threshold(ends, exact, TOPK, kind == "seeded")
        if kind == "seeded":
            rescored = rescored.scatter(1, by_bytes, True)
        assert rescored[chosen].all(), "a chosen block was not rescored"
        out[kind] = rescored.float().mean().item()
        out[kind + "_worst_row"] = rescored.float().mean(1).max().item()
        out[kind + "_token"] = rescored.unflatten(0, (-1, HEADS)).any(1).float().mean().item()
    return {name: round(share, 5) for name, share in out.items()}


# Time, from rates measured on one H200 (docs/kernels.md and the facts of the baseline).

BANDWIDTH = 4.3e12
L2_BANDWIDTH = 5.5e12
GATHERED_FLOPS = 400e12
"""Of products of gathered rows with a block: what the KV-outer attention reaches."""
LAUNCH = 2.5e-6
CHUNK_TOKENS = 8192
SCORE_1M = {"bf16": 14.2e-3, "bytes": 8.13e-3}
TOPK_1M, READ_SCORES_1M = 0.30e-3, 0.25e-3
INVERT_PAIR = 0.045e-3 / (CHUNK_TOKENS * HEADS * TOPK)


def decode_times(row: dict[str, Any], batch: int) -> dict[str, float]:
    """Seconds of index scoring, one new token a sequence: bytes over bandwidth, and the launches added.

    Plain adds one launch to find candidates and one to rescore them; seeded one more, to rescore the seeds.
    """
    tokens = row["context"] * batch
    bounds = {"block": 2 / BLOCK, "key": 2, "group": 2 * DIM // GROUP}[row["bound"]]
    scales = {"e4m3": 0, "int8 per key": 4, "int8 per block": 4 / BLOCK}.get(row["format"], 4 * DIM // GROUP)
    first = tokens * (DIM + bounds + scales) / BANDWIDTH
    again = {kind: row[kind + "_token"] * tokens * 2 * DIM / BANDWIDTH for kind in ("plain", "seeded")}
    return {
        "bf16": tokens * 2 * DIM / BANDWIDTH,
        "bytes": first,
        "plain": first + again["plain"] + 2 * LAUNCH,
        "seeded": first + again["seeded"] + 3 * LAUNCH,
    }


def prefill_times(row: dict[str, Any]) -> dict[str, float]:
    """Seconds of scoring and top-k for 8,192 tokens at the end of the context; queries rounded too.

    ``l2``: each (token, head) reads its candidates for itself. Otherwise candidates are inverted, and each block
    multiplied with the queries that want it. int8 is taken to multiply as fast as e4m3, which was not measured.
    """
    part = row["context"] / 2**20
    score = {name: seconds * part for name, seconds in SCORE_1M.items()}
    out = {"bf16": score["bf16"] + TOPK_1M * part, "bytes": score["bytes"] + TOPK_1M * part}
    for kind, rounds in (("plain", 1), ("seeded", 2)):
        pairs = row[kind] * row["context"] / BLOCK * CHUNK_TOKENS * HEADS
        first = out["bytes"] + READ_SCORES_1M * part + (1 + 4 * rounds) * LAUNCH
        moved = pairs * (2 * DIM + 4) / L2_BANDWIDTH
        out[kind] = first + pairs * INVERT_PAIR + max(moved, pairs * 2 * BLOCK * DIM / GATHERED_FLOPS)
        out[kind + "_l2"] = first + pairs * BLOCK * DIM * 2 / L2_BANDWIDTH
    return out


def table(title: str, head: list[str], lines: list[list[str]]) -> None:
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    print(f"\n{title}\n")
    for line in [head, *lines]:
        print(
            "  ".join(
                cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
        )


def print_times(title: str, rows: list[dict[str, Any]], sizes: list[str], field: str, bound: str) -> None:
    """A line for each format and batch, a column for each context."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        if row["bound"] == bound:
            for size, times in row.get(field, {}).items():
                cells = lines.setdefault((row["format"], row["query"], f"x {size:,}"), [])
                cells.append(f"{times['bf16']:.4g} > {min(times['plain'], times['seeded']):.4g}")
    table(title, ["keys", "query", "tokens", *sizes], [[*key, *cells] for key, cells in lines.items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="8,32,128,512,1024", help="in units of 1,024 tokens")
    parser.add_argument("--tokens", type=int, default=64, help=f"query tokens, of {HEADS} heads each")
    parser.add_argument("--keys", default=",".join(Source.NAMES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    contexts = [int(context) * 1024 for context in arguments.contexts.split(",")]

    start = time.process_time()
    rows: list[dict[str, Any]] = []
    for name in arguments.keys.split(","):
        rows += shares(Source(name, arguments.seed), contexts, arguments.tokens)
        sizes = [f"{context // 1024}K" for context in contexts]
        lines = []
        for rounding, bounds in VARIANTS.items():
            for bound in bounds:
                fields = variant_fields(rounding, bound)
                found = [row for row in rows if row["keys"] == name and fields.items() <= row.items()]
                cells = [f"{row['plain']:.2%}/{row['seeded']:.2%}" for row in found]
                lines.append([*fields.values(), *cells, f"{found[-1]['missed']:.1%}"])
        head = ["keys", "query", "bound", *sizes, "missed"]
        table(f"{name}: blocks rescored for a head, plain/seeded; missed by bytes alone at {sizes[-1]}", head, lines)

    for row in rows:
        if row["format"] == "e4m3 twice":
            continue
        if row["query"] == "exact":
            row["decode_us"] = {batch: scaled(decode_times(row, batch), 1e6) for batch in (1, 8, 32)}
        else:
            row["prefill_ms"] = {CHUNK_TOKENS: scaled(prefill_times(row), 1e3)}
    for name in arguments.keys.split(","):
        of_name = [row for row in rows if row["keys"] == name]
        print_times(
            f"{name}: decode, index scoring, us (model): bf16 > rescored, the better of plain and seeded",
            of_name,
            sizes,
            "decode_us",
            "key",
        )
        print_times(
            f"{name}: prefill of 8,192 tokens, scoring and top-k, ms (model), likewise",
            of_name,
            sizes,
            "prefill_ms",
            "block",
        )
    seconds = time.process_time() - start
    print(f"\n{arguments.tokens * HEADS} query rows, {seconds:.0f} s of CPU time")
    if arguments.json:
        command = f"python research/fp8_rescore.py --tokens {arguments.tokens} --seed {arguments.seed}"
        kept = {"command": command, "torch": torch.__version__, "cpu_seconds": round(seconds)}
        text = ",\n".join(json.dumps(row) for row in rows)  # a line a row
        arguments.json.write_text(f'{json.dumps(kept)[:-1]}, "rows": [\n{text}\n]}}\n')


def scaled(times: dict[str, float], factor: float) -> dict[str, float]:
    return {kind: round(seconds * factor, 3) for kind, seconds in times.items()}


if __name__ == "__main__":
    main()
