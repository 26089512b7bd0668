"""One case: inputs, the check of every implementation, and only then the times."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from msa_backend.bench import baselines, check, counts, inputs, locality, timing
from msa_backend.bench.baselines import Bound, UnsupportedCaseError
from msa_backend.bench.cases import BLOCK_SIZE, Case
from msa_backend.bench.inputs import Inputs
from msa_backend.bench.locality import Neighbours

# Sets of inputs that are taken in turns: more than enough for small ones to fall out of any cache in between.
MOST_SETS = 64
# Of the memory, for one cache, and of what is free then, for all sets.
MEMORY_SHARE = 0.3


@dataclass
class Result:
    """What came of an implementation. Times are seconds; stages are timed apart, ``total`` in one go.

    ``trouble`` is the reason where there are no times: it does not take such a case, or failed, or is wrong.
    """

    name: str
    seconds: dict[str, float] = field(default_factory=dict)
    selection_error: float | None = None
    attention_error: float | None = None
    work: list[counts.Work] = field(default_factory=list)
    kernels: dict[str, float] = field(default_factory=dict)
    trouble: str | None = None
    wrong: bool = False

    @property
    def total(self) -> float | None:
        return self.seconds.get("total")


@dataclass
class CaseResults:
    case: Case
    results: list[Result]
    neighbours: Neighbours | None
    sets: int
    sharing: float = 1.0
    """Sequences that a page serves, on average."""


@dataclass(frozen=True)
class Setup:
    device: torch.device
    clock: timing.Clock
    names: list[str]
    profile: bool = False


def run(case: Case, setup: Setup) -> CaseResults:
    names = list(setup.names)
    sets = _make_sets(case, setup.device)
    sharing = sum(inputs.pages_needed(case)) / len(sets[0].kv_pages)

    # The selection that all attend by: of the first implementation whose own is right.
    results = {name: Result(name) for name in names}
    given: list[Any] | None = None
    for name in names:
        if _selects_rightly(results[name], sets[0]) and given is None:
            given = [_select(name, one) for one in sets]
    if given is None:
        return CaseResults(case, list(results.values()), None, len(sets), sharing)
    of_sparse = counts.sparse_attention(case, inputs.distinct_blocks(given[0], sets[0]))
    for name in names:
        if results[name].trouble is None:
            _time(results[name], sets, given, of_sparse, setup)
        _free(setup.device)
    return CaseResults(case, list(results.values()), locality.neighbours(given[0], case), len(sets), sharing)


def _make_sets(case: Case, device: torch.device) -> list[Inputs]:
    """As many as it takes for each stage, called on them in turns, to find nothing in the processor's cache.

    Between eager calls the clock empties that cache, so two will do. In a graph, selection reads the index keys, so
    there are several KV caches where those are few. Attention reads of K and V what was chosen: where that is little,
    several sets of queries choose from one KV cache.
    """
    if device.type == "cpu":
        return [inputs.make_inputs(case, inputs.make_cache(case, device, seed=0), seed=0)]
    properties = torch.cuda.get_device_properties(device)
    most_pages = int(MEMORY_SHARE * properties.total_memory) // inputs.page_bytes(case)
    first = inputs.make_cache(case, device, 0, most_pages)
    if not case.in_graph:
        second = inputs.make_cache(case, device, 1, most_pages)
        return [inputs.make_inputs(case, cache, seed) for seed, cache in enumerate((first, second))]
    held = _bytes(first.kv_pages) + _bytes(first.index_k_pages)
    block = BLOCK_SIZE * 2 * case.dim * first.kv_pages.element_size()
    attended = case.batch * case.num_kv_heads * case.topk * block  # at least: if all tokens of a sequence agree
    attended += 2 * case.num_tokens * case.num_heads * case.dim * counts.ITEM_SIZE[case.dtype]
    rotated = 4 * properties.L2_cache_size
    fit = max(1, int(MEMORY_SHARE * torch.cuda.mem_get_info(device)[0] / held))
    caches = min(-(-rotated // _bytes(first.index_k_pages)), MOST_SETS, fit)
    count = max(caches, min(-(-rotated // attended), MOST_SETS))
    made = [first, *(inputs.make_cache(case, device, seed, most_pages) for seed in range(1, caches))]
    return [inputs.make_inputs(case, made[i % caches], seed=MOST_SETS + i) for i in range(count)]


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _select(name: str, one: Inputs) -> Any:
    """None if the implementation is dense."""
    select = baselines.load(name).bind(one, None).select
    return select() if select else None


def _selects_rightly(result: Result, one: Inputs) -> bool:
    try:
        found = _select(result.name, one)
        if found is None:
            return False
        result.selection_error = check.selection_error(found, one)
    except UnsupportedCaseError as reason:
        result.trouble = str(reason)
        return False
    except Exception as error:  # whatever a kernel, a compiler or an allocator raises; the others go on
        result.trouble = _failed(error)
        return False
    tolerance = check.SELECTION_TOLERANCE["fp8" if one.case.fp8_index else one.case.dtype]
    if not result.selection_error <= tolerance:
        _call_wrong(result, f"selection is off by {result.selection_error:.1e}, allowed {tolerance:.0e}")
    return not result.wrong


def _time(result: Result, sets: list[Inputs], given: list[Any], of_sparse: counts.Work, setup: Setup) -> None:
    module = baselines.load(result.name)
    case = sets[0].case
    try:
        bound = [module.bind(one, ids) for one, ids in zip(sets, given, strict=True)]
        dense = bound[0].select is None
        _check_attention(result, bound[0], sets[0], None if dense else given[0])
        if result.wrong:
            return
        result.work = [counts.dense_attention(case)] if dense else [counts.selection(case), of_sparse]
        for stage, calls in _stages(bound).items():
            result.seconds[stage] = setup.clock.median(calls, in_graph=case.in_graph)
        if setup.profile and setup.device.type == "cuda":
            result.kernels = timing.kernels(_whole(bound[0]))
    except UnsupportedCaseError as reason:
        result.trouble = str(reason)
    except Exception as error:  # as above
        result.trouble = _failed(error)


def _check_attention(result: Result, bound: Bound, one: Inputs, block_ids: Tensor | None) -> None:
    if bound.poisoned is not None:
        bound.poisoned.fill_(torch.nan)
    out: Any = bound.attend()
    result.attention_error = check.attention_error(out, block_ids, one)
    tolerance = check.ATTENTION_TOLERANCE[one.case.dtype]
    if not result.attention_error <= tolerance:
        _call_wrong(result, f"output is off by {result.attention_error:.1e}, allowed {tolerance:.0e}")


def _stages(bound: list[Bound]) -> dict[str, list[timing.Call]]:
    if bound[0].select is None:
        return {"total": [one.attend for one in bound]}
    stages = {name: [one.parts[name] for one in bound] for name in bound[0].parts}
    stages["select"] = [one.select for one in bound if one.select]
    stages["attend"] = [one.attend for one in bound]
    stages["total"] = [_whole(one) for one in bound]
    return stages


def _whole(one: Bound) -> timing.Call:
    if one.whole is not None:
        return one.whole

    def whole() -> None:
        if one.select is not None:
            one.select()
        one.attend()

    return whole


def _call_wrong(result: Result, how: str) -> None:
    result.wrong, result.trouble = True, f"WRONG: {how}"


def _failed(error: Exception) -> str:
    words = " ".join(str(error).split())
    return f"failed: {type(error).__name__}: {words[:200]}"


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
