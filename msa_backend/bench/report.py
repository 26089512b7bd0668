"""Tables to read and the record to keep. Times are printed and kept in milliseconds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import Any

from msa_backend.bench.cases import Case
from msa_backend.bench.counts import Rates
from msa_backend.bench.locality import Neighbours
from msa_backend.bench.runner import CaseResults, Result

LEGEND = """\
to ours: how many times as long as ours. calibrated: four consecutive tokens choose about 22 distinct blocks of 64, as
in the real model; random: they agree by chance, the worst case. captured for N: the CUDA graph was captured for
sequences of up to N tokens, as a server captures it for its max_model_len; not said: for those of the case."""
STAGES = ("score", "top-k", "select", "attend", "total")
OURS = "ours"


def milliseconds(seconds: float | None) -> str:
    """Four significant digits from a microsecond to a second."""
    if seconds is None:
        return "-"
    ms = seconds * 1e3
    return f"{ms:.{max(0, min(4, 3 - math.floor(math.log10(ms))))}f}"


def ratio(theirs: float | None, ours: float | None) -> str:
    """How many times as long as ours theirs takes."""
    return "-" if theirs is None or ours is None else f"{theirs / ours:.2f}x"


def of_ceiling(result: Result, rates: Rates) -> float:
    """Floor over time: the stages' floors are summed, since one needs the other's result."""
    assert result.total is not None
    return sum(work.floor(rates) for work in result.work) / result.total


def rate(result: Result, *, by_bytes: bool) -> str:
    assert result.total is not None
    if by_bytes:
        return per_second(sum(work.bytes for work in result.work) / result.total, "B")
    return per_second(sum(work.flop for work in result.work) / result.total, "FLOP")


def per_second(count: float, unit: str) -> str:
    for prefix, size in (("T", 1e12), ("G", 1e9)):
        if count >= 0.1 * size or prefix == "G":
            break
    return f"{count / size:.3g} {prefix}{unit}/s"


def block(found: CaseResults, rates: Rates) -> Iterator[str]:
    """Lines on one case: a line for each implementation, with its stages."""
    ours = next((result.total for result in found.results if result.name == OURS), None)
    about = [found.case.title, f"{found.sets} set{'s' * (found.sets > 1)} of inputs"]
    if found.neighbours is not None:
        tokens, distinct, chosen = found.neighbours
        about.append(f"{tokens} consecutive tokens choose {distinct:.1f} distinct blocks of {chosen:.1f}")
    if found.sharing > 1:
        about.append(f"{found.sharing:.1f} sequences share a page")
    yield "; ".join(about)
    yield (
        f"  {'ms':10}"
        + "".join(f"{stage:>9}" for stage in STAGES)
        + (f"{'to ours':>9}{'rate':>14}{'of ceiling':>12}   off by: select, attend")
    )
    for result in found.results:
        line = f"  {result.name:10}"
        if result.total is None:
            yield line + f" {result.trouble}"
            continue
        line += "".join(f"{milliseconds(result.seconds.get(stage)):>9}" for stage in STAGES)
        line += f"{ratio(result.total, ours):>9}{rate(result, by_bytes=found.case.in_graph):>14}"
        line += f"{of_ceiling(result, rates):>12.0%}   "
        yield line + ", ".join(_error(error) for error in (result.selection_error, result.attention_error))
        for name, seconds in result.kernels.items():
            yield f"    {milliseconds(seconds):>9}  {name[:100]}"


def _error(error: float | None) -> str:
    return "-" if error is None else f"{error:.0e}" if error else "0"


def summary(found: list[CaseResults], rates: Rates) -> Iterator[str]:
    """A line for each case: ours, then each baseline's total and how many times ours that is."""
    names = list(dict.fromkeys(result.name for case in found for result in case.results))
    others = [name for name in names if name != OURS]
    width = max((len(case.case.title) for case in found), default=0)
    yield f"{'total, ms':{width}}{OURS:>10}{'of ceiling':>12}" + "".join(f"{name:>12}{'':>8}" for name in others)
    for case in found:
        by_name = {result.name: result for result in case.results}
        ours = by_name.get(OURS)
        ours_total = ours.total if ours else None
        share = f"{of_ceiling(ours, rates):.0%}" if ours and ours.total is not None else "-"
        line = f"{case.case.title:{width}}{milliseconds(ours_total):>10}{share:>12}"
        for name in others:
            total = by_name[name].total if name in by_name else None
            line += f"{milliseconds(total):>12}{ratio(total, ours_total):>8}"
        yield line


def record(found: list[CaseResults], rates: Rates, about: dict[str, Any], absent: dict[str, str]) -> dict[str, Any]:
    """Everything, for a file."""
    return {
        **about,
        "ceilings": {
            "read_TB_per_s": rates.bandwidth / 1e12,
            "copy_TB_per_s": rates.copy / 1e12,
            "matmul_TFLOP_per_s": rates.flops / 1e12,
            "fp8_matmul_TFLOP_per_s": rates.fp8_flops / 1e12,
        },
        "absent": absent,
        "cases": [
            {
                **asdict(case.case),
                "sets": case.sets,
                "sharing": case.sharing,
                "neighbours": case.neighbours and case.neighbours._asdict(),
                "results": {result.name: _result(result, rates) for result in case.results},
            }
            for case in found
        ],
    }


def read(written: dict[str, Any]) -> list[CaseResults]:
    """The cases and times of what :func:`record` made.

    Raises:
        KeyError, TypeError: it is something else.
    """
    found = []
    for kept in written["cases"]:
        case = Case(**{name.name: kept[name.name] for name in fields(Case)})
        results = [
            Result(name, {stage: ms / 1e3 for stage, ms in result.get("ms", {}).items()}, trouble=result.get("trouble"))
            for name, result in kept["results"].items()
        ]
        neighbours = kept["neighbours"] and Neighbours(**kept["neighbours"])
        found.append(CaseResults(case, results, neighbours, kept["sets"], kept["sharing"]))
    return found


def _result(result: Result, rates: Rates) -> dict[str, Any]:
    if result.total is None:
        return {"trouble": result.trouble}
    return {
        "ms": {stage: seconds * 1e3 for stage, seconds in result.seconds.items()},
        "floor_ms": [work.floor(rates) * 1e3 for work in result.work],
        "of_ceiling": of_ceiling(result, rates),
        "flop": sum(work.flop for work in result.work),
        "bytes": sum(work.bytes for work in result.work),
        "selection_error": result.selection_error,
        "attention_error": result.attention_error,
        "kernels_ms": {name: seconds * 1e3 for name, seconds in result.kernels.items()},
    }
