"""Host time of one layer's operations, called eagerly: what a step costs while the GPU waits for launches.

Prefill, suffixes and mixed steps run outside of full CUDA graphs, so the host launches every kernel of every layer. The
GPU's time is not in these figures, nor is what an engine does around the operations.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch

from msa_backend.bench import baselines, inputs
from msa_backend.bench.cases import Case
from msa_backend.bench.report import OURS, ratio
from msa_backend.bench.timing import Call

PARTS = {"attend": "select + attend", "layer": "with norm, rope and write"}
WARM = 5
# Between two waits for the device: with a dozen launches each, far fewer than the thousand that a stream queues
# before a launch waits for room.
CALLS = 20
LEAST_ROUNDS = 3


@dataclass
class HostResult:
    """``seconds`` by :data:`PARTS`; what is missing has a reason in ``trouble``."""

    name: str
    seconds: dict[str, float] = field(default_factory=dict)
    trouble: str | None = None


@dataclass
class HostCase:
    case: Case
    results: list[HostResult]


def run(case: Case, names: list[str], device: torch.device, budget: float) -> HostCase:
    """``budget``: host seconds for a median."""
    made = inputs.make_inputs(case, inputs.make_cache(case, device, seed=0), seed=0)
    projection = inputs.make_projection(made, seed=0)
    results = []
    for name in names:
        results.append(HostResult(name))
        try:
            layer = baselines.load(name).layer(made, projection)

            def whole(layer: baselines.Layer = layer) -> None:
                layer.write()
                layer.attend()

            for part, call in (("attend", layer.attend), ("layer", whole)):
                results[-1].seconds[part] = host_seconds(call, device, budget)
        except Exception as error:  # whatever a kernel, a compiler or an allocator raises; the others go on
            results[-1].trouble = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return HostCase(case, results)


def host_seconds(call: Call, device: torch.device, budget: float) -> float:
    """Median over rounds of calls that do not wait for the device. On a CPU a call's own work is in it."""

    def drain() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    calls = CALLS if device.type == "cuda" else 1
    for _ in range(WARM if device.type == "cuda" else 1):  # compiles, tunes, allocates
        call()
    rounds: list[float] = []
    while len(rounds) < LEAST_ROUNDS or sum(rounds) * calls < budget:
        drain()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        rounds.append((time.perf_counter() - start) / calls)
    drain()
    return median(rounds)


def table(found: list[HostCase]) -> Iterator[str]:
    """Microseconds, a line for each case and part: ours, then each baseline's and how many times ours that is."""
    names = list(dict.fromkeys(result.name for case in found for result in case.results))
    titles = {(i, part): f"{case.case.title}; {PARTS[part]}" for i, case in enumerate(found) for part in PARTS}
    width = max(map(len, titles.values()), default=0)
    yield f"{'host time of a layer, us':{width}}" + "".join(f"{n:>10}" + f"{'to ours':>9}" * (n != OURS) for n in names)
    for (i, part), title in titles.items():
        seconds = {result.name: result.seconds.get(part) for result in found[i].results}
        line = f"{title:{width}}"
        for name in names:
            found_here = seconds.get(name)
            line += f"{'-' if found_here is None else f'{found_here * 1e6:.0f}':>10}"
            line += f"{ratio(found_here, seconds.get(OURS)):>9}" * (name != OURS)
        yield line
    for case in found:
        for result in case.results:
            if result.trouble:
                yield f"{case.case.title}: {result.name} failed: {result.trouble}"


def record(found: list[HostCase]) -> list[dict[str, Any]]:
    """Everything, for a file."""
    return [
        {
            **asdict(case.case),
            "host_us": {
                result.name: {part: seconds * 1e6 for part, seconds in result.seconds.items()}
                for result in case.results
            },
            "trouble": {result.name: result.trouble for result in case.results if result.trouble},
        }
        for case in found
    ]
