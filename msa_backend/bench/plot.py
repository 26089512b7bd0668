"""Time against context, both logarithmic: a panel for each mode, a colour for each implementation.

Cases that differ in more than the context (heads, batch, new tokens, dtypes) are lines with markers of their own.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from msa_backend.bench.baselines import NAMES
from msa_backend.bench.cases import CALIBRATED, NEW_TOKENS, Case, short
from msa_backend.bench.runner import CaseResults

Line = list[tuple[int, float]]
MARKERS = "os^vDP*X<>ph"


def variant(case: Case) -> str:
    words = [f"{case.num_heads}/{case.num_kv_heads}"]
    words += [f"x {case.batch}"] * (case.batch > 1)
    words += [f"{case.new_tokens} new"] * (case.new_tokens != min(case.context, NEW_TOKENS[case.mode]))
    words += ["fp8 index"] * case.fp8_index + ["fp8 KV"] * case.fp8_kv
    words += [case.locality_name] * (case.new_tokens > 1 and case.locality != CALIBRATED)
    words += [f"for {short(case.bound)}"] * (case.bound > 0)
    return " ".join(words)


def lines(found: list[CaseResults]) -> dict[str, dict[tuple[str, str], Line]]:
    """By mode, then by implementation and :func:`variant`: (context, milliseconds), in the order of the contexts."""
    panels: dict[str, dict[tuple[str, str], Line]] = defaultdict(lambda: defaultdict(list))
    for case in found:
        for result in case.results:
            if result.total is not None:
                point = (case.case.context, result.total * 1e3)
                panels[case.case.mode][result.name, variant(case.case)].append(point)
    return {mode: {key: sorted(line) for key, line in of_mode.items()} for mode, of_mode in panels.items()}


def write(found: list[CaseResults], path: Path, title: str) -> None:
    """Draw it into a file of the type its name ends in.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = lines(found)
    rows = max(1, len(panels))
    figure, axes = pyplot.subplots(rows, 1, figsize=(11, 5 * rows), squeeze=False, layout="constrained")
    for axis, (mode, of_mode) in zip(axes[:, 0], panels.items(), strict=False):
        variants = list(dict.fromkeys(variant for _, variant in of_mode))
        for (name, of_case), line in of_mode.items():
            contexts, times = zip(*line, strict=True)
            marker = MARKERS[variants.index(of_case) % len(MARKERS)]
            axis.loglog(contexts, times, color=f"C{NAMES.index(name)}", marker=marker, label=f"{name} {of_case}")
        axis.set(title=mode, xlabel="tokens of context", ylabel="ms")
        axis.grid(True, which="both", alpha=0.3)
        axis.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.01, 1), ncols=1 + len(of_mode) // 26)
    figure.suptitle(title)
    figure.savefig(path, dpi=100, bbox_inches="tight")
    pyplot.close(figure)
