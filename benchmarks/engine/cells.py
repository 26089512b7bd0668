"""How long a user waits: the first token of a cold prompt, of a suffix after a prefix hit, and each token after it.

Decode is measured twice. By the engine's clock a step of a small model is bound by the host, which the released model
would hide; so the time of its kernels on the GPU is taken too, in a second round over all contexts: a profiler that
ran once leaves hooks behind, and the clock must not feel them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from engine import prompts, timeline
from engine.session import Batch, FirstToken, Session

KINDS = ("ttft", "suffix", "decode")
WAITED = ("wall", "engine")
ENGINE = ("engine",)
GPU = ("GPU", "GPU busy")
ROW = 16  # tokens that a row of a batch has to itself: few, so that all rows of a batch begin in one step
ROW_KEEPS = 4 * prompts.BLOCK  # of cache: them and the answer, roughly
SETTLE = 8  # steps before the first that counts
WINDOW = (8, 64)  # steps a decode sample is the mean of: at least, at most


@dataclass(frozen=True)
class Plan:
    """What to measure, and how much of it.

    Attributes:
        contexts: tokens of prompt, or before the suffix, or before the answer.
        suffixes: new tokens after a prefix hit.
        batches: requests that decode at once.
        kinds: which of KINDS.
        repeats: samples a cell.
        window_ms: how long one sample of decode lasts, roughly.
        gpu_steps: decode steps that are profiled; with 0 the engine's clock is the only one.
        cold_tokens: cold prompts are repeated only as often as this many tokens allow, once at least.
        prefix_tokens: the rows of a batch share as many different cached prompts as fit in this, one at least.
        row_tokens: a batch whose prompts have more tokens together is left out: handing them over takes too long.
        seconds: cells that would begin later than this are left out; None: all are measured.
    """

    contexts: tuple[int, ...]
    suffixes: tuple[int, ...]
    batches: tuple[int, ...]
    kinds: tuple[str, ...] = KINDS
    repeats: int = 3
    window_ms: float = 200
    gpu_steps: int = 8
    cold_tokens: int = 262_144
    prefix_tokens: int = 262_144
    row_tokens: int = 9_000_000
    seconds: float | None = None


class Clock:
    """Whether there is time left."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds, self.started = seconds, time.monotonic()

    def over(self) -> str | None:
        late = self.seconds is not None and time.monotonic() - self.started > self.seconds
        return f"not within {self.seconds:g} s" if late else None


def measure(session: Session, plan: Plan) -> Iterator[dict[str, Any]]:
    """Rows `cell, clock, unit, values` in milliseconds, or `cell, clock, skipped`, as they are found."""
    clock = Clock(plan.seconds)
    warm_up(session, plan)
    for context in plan.contexts:
        if "ttft" in plan.kinds:
            yield from cold(session, plan, context, clock)
        if "suffix" in plan.kinds:
            yield from suffixes(session, plan, context, clock)
        if "decode" in plan.kinds:
            yield from decode(session, plan, context, ENGINE, clock)
    if "decode" in plan.kinds and plan.gpu_steps:
        for context in plan.contexts:
            yield from decode(session, plan, context, GPU, clock)


def warm_up(session: Session, plan: Plan) -> None:
    """Whatever compiles at its first use does so before the first sample."""
    context = min(plan.contexts)
    fill(session, context, 1, first=1000)
    for new in plan.suffixes:
        session.first_token(prompts.after_hit(context, 1000, new, "warm up", new))


def cold(session: Session, plan: Plan, context: int, clock: Clock) -> Iterator[dict[str, Any]]:
    cell = f"TTFT {context:,}"
    reason = clock.over() or too_long(session, context)
    if reason:
        yield from skipped(cell, WAITED, reason)
        return
    repeats = max(1, min(plan.repeats, plan.cold_tokens // context))
    found = [session.first_token(prompts.context(context, seed)) for seed in range(repeats)]
    warm = max(one.cached for one in found)
    if warm:
        raise RuntimeError(f"{warm} tokens of a new prompt of {context} were cached: it was not cold.")
    yield from first_tokens(cell, found)


def suffixes(session: Session, plan: Plan, context: int, clock: Clock) -> Iterator[dict[str, Any]]:
    filled = False
    for new in plan.suffixes:
        cell = f"suffix {new:,} @ {context:,}"
        reason = clock.over() or too_long(session, context + new)
        if reason:
            yield from skipped(cell, WAITED, reason)
            continue
        if not filled:
            fill(session, context, 1)
            filled = True
        asked = [prompts.after_hit(context, 0, new, new, repeat) for repeat in range(plan.repeats)]
        found = [session.first_token(tokens) for tokens in asked]
        hit = min(one.cached for one in found)
        if hit < prompts.kept(context):
            raise RuntimeError(f"Of a prompt of {context} tokens only {hit} were cached; is prefix caching on?")
        yield from first_tokens(cell, found)


def first_tokens(cell: str, found: list[FirstToken]) -> Iterator[dict[str, Any]]:
    yield row(cell, WAITED[0], [1e3 * one.wall for one in found])
    engine = [1e3 * one.engine for one in found if one.engine is not None]
    if engine:
        yield row(cell, WAITED[1], engine)


def decode(
    session: Session, plan: Plan, context: int, clocks: tuple[str, ...], clock: Clock
) -> Iterator[dict[str, Any]]:
    """A batch that grows from size to size while its rows decode; by ENGINE or by GPU."""
    sizes = {size: too_many(session, plan, context, size) for size in sorted(plan.batches)}
    prefixes = shared_prefixes(plan, context, max((size for size in sizes if not sizes[size]), default=1))
    batch = session.batch()
    for size, reason in sizes.items():
        cell = f"decode {size} @ {context:,}"
        reason = clock.over() or reason
        if reason:
            yield from skipped(cell, clocks, reason)
            continue
        if not batch.names:
            fill(session, context, prefixes)
        while len(batch.names) < size:
            number = len(batch.names)
            batch.add(prompts.after_hit(context, number % prefixes, ROW, clocks, number))
        for found in engine_times(batch, plan, cell) if clocks == ENGINE else gpu_times(batch, plan, cell):
            yield found | {"prefixes": min(prefixes, size)}
    batch.stop()


def engine_times(batch: Batch, plan: Plan, cell: str) -> list[dict[str, Any]]:
    """Milliseconds a step, each the mean of a window of steps."""
    times = batch.steps(SETTLE)
    each = max(statistics.median(after - before for before, after in zip(times, times[1:], strict=False)), 1e-6)
    count = int(min(max(plan.window_ms / 1e3 / each, WINDOW[0], batch.SHORTEST_WINDOW), WINDOW[1]))
    times = batch.steps(count * plan.repeats)
    ends = times[::count]
    values = [1e3 * (end - start) / count for start, end in zip(ends, ends[1:], strict=False)]
    return [row(cell, ENGINE[0], values)]


def gpu_times(batch: Batch, plan: Plan, cell: str) -> list[dict[str, Any]]:
    """Milliseconds of all kernels, and milliseconds in which any kernel or copy ran, step by step."""
    batch.steps(SETTLE)
    with batch.session.profile() as files:
        batch.steps_from_now(plan.gpu_steps + 2)
    found = timeline.decoding(timeline.read(files[0]), len(batch.names))
    if not any(step.kernels for step in found):
        return list(skipped(cell, GPU, "the trace has no kernels of such steps"))
    kernels = {"kernels": statistics.median(len(step.kernels) for step in found)}
    return [
        row(cell, GPU[0], [step.gpu / 1e3 for step in found]) | kernels,
        row(cell, GPU[1], [step.busy / 1e3 for step in found]),
    ]


def fill(session: Session, context: int, count: int, first: int = 0) -> None:
    """Put `count` prompts into the prefix cache, those that are not in it."""
    for seed in range(first, first + count):
        session.first_token(prompts.context(context, seed))


def shared_prefixes(plan: Plan, context: int, size: int) -> int:
    return max(1, min(size, plan.prefix_tokens // context))


def too_long(session: Session, length: int) -> str | None:
    longest = min(session.max_model_len, session.kv_tokens) - 1
    return f"the engine takes {longest:,} tokens" if length > longest else None


def too_many(session: Session, plan: Plan, context: int, size: int) -> str | None:
    if size > session.resolved["max_num_seqs"]:
        return f"max_num_seqs is {session.resolved['max_num_seqs']}"
    if size * context > plan.row_tokens:
        return f"{size * context:,} tokens of prompts; --row-tokens is {plan.row_tokens:,}"
    needed = shared_prefixes(plan, context, size) * context + size * ROW_KEEPS
    if needed > session.kv_tokens:
        return f"needs {needed:,} tokens of KV cache, there are {session.kv_tokens:,}"
    return too_long(session, context + ROW_KEEPS)


def row(cell: str, clock: str, milliseconds: list[float]) -> dict[str, Any]:
    return {"cell": cell, "clock": clock, "unit": "ms", "values": [round(value, 4) for value in milliseconds]}


def skipped(cell: str, clocks: tuple[str, ...], reason: str) -> Iterator[dict[str, Any]]:
    for clock in clocks:
        yield {"cell": cell, "clock": clock, "skipped": reason}
