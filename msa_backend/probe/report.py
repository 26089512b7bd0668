"""Results for people: a map of length against depth for each task, in the terminal or as PNG."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .cells import BOUNDARY

SHADES = " .:-=+*#%@"


def by_task(cells: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for cell in cells.values():
        found.setdefault(cell["task"], []).append(cell)
    return found


def means(cells: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Of each task, the worse of cold and cached."""
    return {
        task: min(
            sum(cell[score] for cell in of_task) / len(of_task)
            for score in ("score", "score_cached")
            if score in of_task[0]
        )
        for task, of_task in by_task(cells).items()
    }


def lines(cells: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Percent of right answers, lengths down, depths across; ``a|b`` where cold and cached differ."""
    for task, of_task in by_task(cells).items():
        depths = sorted({cell["depth"] for cell in of_task})
        names = [f"{depth:g}" if task == BOUNDARY else f"{100 * depth:g}%" for depth in depths]
        yield ""
        yield f"{task:<12}" + "".join(f"{name:>9}" for name in names) + "   seconds"
        for length in sorted({cell["length"] for cell in of_task}):
            row = {cell["depth"]: cell for cell in of_task if cell["length"] == length}
            shown = "".join(f"{_percent(row[depth]) if depth in row else '':>9}" for depth in depths)
            yield f"{length:>12,}{shown}{max(cell['seconds'] for cell in row.values()):>10.2f}"


def _percent(cell: dict[str, Any]) -> str:
    cold, cached = cell["score"], cell.get("score_cached", cell["score"])
    shade = SHADES[round(min(cold, cached) * (len(SHADES) - 1))]
    return f"{100 * cold:.0f}" + (f"|{100 * cached:.0f}" if cached != cold else "") + shade


def plot(cells: dict[str, dict[str, Any]], path: Path, title: str) -> None:
    """Draw the maps into a file of the type its name ends in.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = by_task(cells)
    figure, axes = pyplot.subplots(1, len(tasks), figsize=(5 * len(tasks), 4), squeeze=False, layout="constrained")
    for axis, (task, of_task) in zip(axes[0], tasks.items(), strict=True):
        depths = sorted({cell["depth"] for cell in of_task})
        lengths = sorted({cell["length"] for cell in of_task})
        found = {(cell["length"], cell["depth"]): cell["score"] for cell in of_task}
        image = [[found.get((length, depth), float("nan")) for depth in depths] for length in lengths]
        axis.imshow(image, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axis.set_xticks(range(len(depths)), [f"{depth:g}" for depth in depths])
        axis.set_yticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axis.set(title=task, xlabel="offset in the block" if task == BOUNDARY else "depth", ylabel="tokens of prompt")
    figure.suptitle(title)
    figure.savefig(path)
