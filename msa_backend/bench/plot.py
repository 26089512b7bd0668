"""Time against context, both logarithmic: a panel for each mode, a line for each implementation and batch."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from msa_backend.bench.runner import CaseResults

Line = list[tuple[int, float]]


def lines(found: list[CaseResults]) -> dict[str, dict[str, Line]]:
    """By mode and label: (context, milliseconds), by context."""
    panels: dict[str, dict[str, Line]] = defaultdict(lambda: defaultdict(list))
    for case in found:
        of = case.case
        suffix = f" {of.num_heads}/{of.num_kv_heads}" + f" x {of.batch}" * (of.batch > 1)
        suffix += " fp8 index" * of.fp8_index + " fp8 KV" * of.fp8_kv + " local" * (of.share > 0)
        for result in case.results:
            if result.total is not None:
                panels[of.mode][result.name + suffix].append((of.context, result.total * 1e3))
    return {mode: {label: sorted(line) for label, line in of.items()} for mode, of in panels.items()}


def write(found: list[CaseResults], path: Path, title: str) -> None:
    """Raises:
    ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = lines(found)
    figure, axes = pyplot.subplots(1, max(1, len(panels)), figsize=(7 * max(1, len(panels)), 5), squeeze=False)
    for axis, (mode, of_mode) in zip(axes[0], panels.items(), strict=False):
        for label, line in of_mode.items():
            contexts, times = zip(*line, strict=True)
            axis.loglog(contexts, times, marker="o", label=label)
        axis.set(title=mode, xlabel="tokens of context", ylabel="ms")
        axis.grid(True, which="both", alpha=0.3)
        axis.legend(fontsize="small")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
