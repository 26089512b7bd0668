"""Results for people: tables and a map in the terminal, maps as PNG; and for programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from msa_backend.bench.locality import NEIGHBOURS
from msa_backend.probe.report import SHADES

from .measure import Measures
from .selectors import SELECTORS

PLACES = ("first", "local", "target")
LINES_PER_ROW = 2
"""Rows of a map in a line of the terminal, whose characters are about twice as high as wide."""


def result(measures: Measures) -> dict[str, Any]:
    """All that was measured, as JSON can hold it; None where no query token was asked. docs/inspect.md has the keys."""
    plan, means, shared = measures.plan, measures.means, measures.shared

    def of_place(layer: int, group: int, kind: str, when: str) -> dict[str, float | None]:
        return {place: means.get((layer, kind, place, when), group) for place in PLACES}

    def entry(index: int, layer: int, group: int) -> dict[str, Any]:
        settings = [(size, selection.topk) for size, selection in plan.sweep]
        return {
            "layer": layer,
            "group": group,
            "recall": {name: means.get((layer, "recall", name), group) for name in SELECTORS},
            "distinct": measures.distinct(layer)[group],
            "mass": of_place(layer, group, "mass", "all"),
            "chosen": of_place(layer, group, "chosen", "all"),
            "mass_last": of_place(layer, group, "mass", "last"),
            "chosen_last": of_place(layer, group, "chosen", "last"),
            "shared_with": dict(zip(map(str, plan.layers), shared[group, index].tolist(), strict=True)),
            "sweep": [
                {"block_size": size, "topk": topk}
                | {name: means.get((layer, "sweep", size, topk, name), group) for name in SELECTORS}
                for size, topk in settings
            ],
            "blocks": measures.blocks(layer)[group].tolist(),
            "map": [[round(share, 4) for share in row] for row in measures.maps[layer].shares()[group].tolist()],
        }

    return {
        "tokens": plan.num_tokens,
        "block_size": plan.block_size,
        "topk": plan.selection.topk,
        "local_blocks": plan.selection.local_blocks,
        "target": plan.target,
        "queries": plan.queries,
        "neighbours": NEIGHBOURS,
        "bin_blocks": measures.maps[plan.layers[0]].bin_blocks,
        "groups": [
            entry(index, layer, group)
            for index, layer in enumerate(plan.layers)
            for group in range(measures.num_kv_heads)
        ],
    }


def mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def lines(found: dict[str, Any]) -> Iterator[str]:
    """What :func:`result` returned."""
    groups, topk, size = found["groups"], found["topk"], found["block_size"]
    yield f"{found['tokens']:,} tokens, {-(-found['tokens'] // size):,} blocks of {size}; each query selects {topk}"
    if found["target"]:
        begin, end = found["target"]
        yield f"target: tokens {begin:,} to {end - 1:,}, blocks {begin // size} to {(end - 1) // size}"
    yield ""
    yield "Blocks that queries select, mean of layers and groups; queries down, blocks across"
    yield from picture(mean_map([group["map"] for group in groups]))
    yield ""
    yield from recall_table(found)
    yield ""
    yield from place_table(found)
    yield ""
    yield from sweep_table(found)


def mean_map(maps: list[list[list[float]]]) -> list[list[float]]:
    return [[sum(cells) / len(maps) for cells in zip(*rows, strict=True)] for rows in zip(*maps, strict=True)]


def picture(shares: list[list[float]]) -> Iterator[str]:
    for start in range(0, len(shares), LINES_PER_ROW):
        rows = shares[start : start + LINES_PER_ROW]
        cells = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        # By the root: most of what is chosen is a small share of what there is.
        yield "|" + "".join(SHADES[round(min(1.0, cell) ** 0.5 * (len(SHADES) - 1))] for cell in cells) + "|"


def recall_table(found: dict[str, Any]) -> Iterator[str]:
    topk, queries, groups = found["topk"], len(found["queries"]), found["groups"]
    distinct, layers = f"of {NEIGHBOURS * topk}", list(dict.fromkeys(str(group["layer"]) for group in groups))
    yield f"Share of dense attention in {topk} blocks, %, mean of {queries:,} queries that see more blocks than that;"
    yield f"distinct blocks of {NEIGHBOURS} consecutive tokens; % of blocks that the next sparse layer selects too"
    yield "layer group" + "".join(f"{name:>8}" for name in SELECTORS) + f"{distinct:>9}{'next':>7}"
    for group in groups:
        after = layers[layers.index(str(group["layer"])) + 1 :]
        yield (
            f"{group['layer']:>5}{group['group']:>6}"
            + "".join(f"{percent(group['recall'][name]):>8}" for name in SELECTORS)
            + f"{group['distinct']:>9.1f}{percent(group['shared_with'][after[0]] if after else None):>7}"
        )
    means = [percent(mean([group["recall"][name] for group in groups])) for name in SELECTORS]
    yield f"{'mean':<11}" + "".join(f"{text:>8}" for text in means) + f"{mean([g['distinct'] for g in groups]):>9.1f}"


def place_table(found: dict[str, Any]) -> Iterator[str]:
    places = [place for place in PLACES if place != "target" or found["target"]]
    yield f"Dense attention on places, %, and how often their blocks are selected, %; last: of the last {NEIGHBOURS}"
    yield "layer group" + "".join(f"{place:>8}{'sel.':>6}{'last':>6}{'sel.':>6}" for place in places)
    for group in found["groups"]:
        yield f"{group['layer']:>5}{group['group']:>6}" + "".join(
            f"{percent(group['mass'][place]):>8}{percent(group['chosen'][place]):>6}"
            f"{percent(group['mass_last'][place]):>6}{percent(group['chosen_last'][place]):>6}"
            for place in places
        )


def sweep_table(found: dict[str, Any]) -> Iterator[str]:
    yield "Other settings on the same queries and keys, mean of layers and groups, %"
    yield " block top-k  tokens" + "".join(f"{name:>8}" for name in SELECTORS)
    for settings in zip(*(group["sweep"] for group in found["groups"]), strict=True):
        size, topk = settings[0]["block_size"], settings[0]["topk"]
        means = [percent(mean([of_group[name] for of_group in settings])) for name in SELECTORS]
        yield f"{size:>6}{topk:>6}{size * topk:>8,}" + "".join(f"{text:>8}" for text in means)


def plot(found: dict[str, Any], path: Path, title: str) -> None:
    """Draw the map of every layer and group into a file of the type its name ends in.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = found["groups"]
    columns = 1 + max(group["group"] for group in groups)
    rows = len(groups) // columns
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(3.2 * columns, 3.2 * rows + 0.6), squeeze=False, layout="constrained"
    )
    span = found["tokens"] / 1024
    for axis, group in zip(axes.flat, groups, strict=True):
        shares = [[share**0.5 for share in row] for row in group["map"]]
        axis.imshow(shares, vmin=0, vmax=1, cmap="magma", extent=(0, span, span, 0), interpolation="nearest")
        axis.set_title(
            f"layer {group['layer']}, group {group['group']}: {percent(group['recall']['msa'])} % of attention",
            fontsize=8,
        )
        axis.tick_params(labelsize=7)
        if found["target"]:
            axis.axvline(found["target"][0] / 1024, color="cyan", linewidth=0.6)
    figure.supxlabel("selected block, in K tokens")
    figure.supylabel("query, in K tokens")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
