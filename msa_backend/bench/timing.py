"""Medians of what a device does, host time left out as far as it is in an engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Protocol

import torch

Call = Callable[[], object]


class Clock(Protocol):
    def median(self, calls: list[Call], *, in_graph: bool) -> float:
        """Seconds that one of ``calls`` takes. They do the same on inputs of their own and are run in turns."""


class CpuClock:
    def __init__(self, budget: float) -> None:
        self.budget = budget

    def median(self, calls: list[Call], *, in_graph: bool) -> float:
        for call in calls:
            call()
        times: list[float] = []
        while len(times) < 3 or sum(times) < self.budget:
            start = time.perf_counter()
            calls[len(times) % len(calls)]()
            times.append(time.perf_counter() - start)
        return median(times)


class CudaClock:
    """By events. ``budget`` is the device seconds that one median may take, beyond a least number of runs."""

    LEAST, MOST = 5, 200
    # Calls in one graph: enough that events, which resolve about a microsecond, hardly count; fewer of long ones.
    IN_GRAPH, IN_GRAPH_SECONDS = 20, 5e-3

    def __init__(self, budget: float, cache_bytes: int) -> None:
        self.budget = budget
        # Written before each eager call: keeps the device busy while the host queues the call, so that its kernels
        # follow each other as closely as the device allows, and leaves nothing of the inputs in the cache.
        self.scratch = torch.empty(max(2**31, 4 * cache_bytes), dtype=torch.uint8, device="cuda")

    def median(self, calls: list[Call], *, in_graph: bool) -> float:
        for call in calls:  # compiles, tunes, allocates
            call()
        torch.cuda.synchronize()
        return self._of_replays(calls) if in_graph else self._of_calls(calls)

    def _of_calls(self, calls: list[Call]) -> float:
        first = self._events(calls[:1])[0]
        repeats = min(self.MOST, max(self.LEAST, round(self.budget / first)))
        return median(self._events([calls[i % len(calls)] for i in range(repeats)]))

    def _events(self, calls: list[Call]) -> list[float]:
        pairs = []
        for call in calls:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self.scratch.zero_()
            start.record()
            call()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]

    def _of_replays(self, calls: list[Call]) -> float:
        seconds = self._events(calls[:1])[0] * len(calls)
        rounds = max(1, min(-(-self.IN_GRAPH // len(calls)), round(self.IN_GRAPH_SECONDS / seconds)))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls * rounds:
                call()
        count = rounds * len(calls)
        once = self._events([graph.replay])[0]
        repeats = min(self.MOST, max(self.LEAST, round(self.budget / once)))
        replays = self._events([graph.replay] * repeats)
        return median(replays) / count


def kernels(call: Call, repeats: int = 5) -> dict[str, float]:
    """Seconds in each kernel of one call, by the profiler: the sum where a kernel runs more than once."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    times = {event.key: event.self_device_time_total / 1e6 / repeats for event in found.key_averages()}
    return {name: seconds for name, seconds in times.items() if seconds}
