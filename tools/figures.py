"""Draws the pictures of docs/concepts.md: ``python tools/figures.py``. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "figures"
CHOSEN, FORCED, PLAIN, LINE, QUERY = "#3f51b5", "#ff9800", "#e0e0e0", "#9e9e9e", "#00897b"
STYLE = "font-family: sans-serif; font-size: 13px"


def box(x: float, y: float, width: float, height: float, fill: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" fill="{fill}" stroke="white"/>'


def say(x: float, y: float, text: str, anchor: str = "start", colour: str = "#424242") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{colour}">{text}</text>'


def line(x: float, y: float, to_x: float, to_y: float, colour: str = LINE) -> str:
    return f'<line x1="{x:g}" y1="{y:g}" x2="{to_x:g}" y2="{to_y:g}" stroke="{colour}" stroke-width="1.5"/>'


def picture(width: int, height: int, title: str, parts: Iterator[str]) -> str:
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" style="{STYLE}">\n'
        f"<title>{title}</title>\n{box(0, 0, width, height, 'white')}\n{body}\n</svg>\n"
    )


def blocks() -> Iterator[str]:
    """The two branches of a sparse layer over one row of blocks."""
    scores = (0.35, 0.2, 0.9, 0.3, 0.15, 0.55, 0.25, 0.8, 0.1, 0.4, 0.3, 0.45)
    chosen = {2, 5, 7}
    yield say(10, 24, "index keys: one of 128 channels for each token, shared by all heads")
    for number, score in enumerate(scores):
        x = 10 + number * 60
        for token in range(8):
            height = 36 * score * (0.4 + 0.6 * ((token * 5 + number * 3) % 8) / 7)
            yield box(x + 2 + token * 6.6, 74 - height, 5, height, QUERY)
        colour = FORCED if number == len(scores) - 1 else CHOSEN if number in chosen else PLAIN
        yield line(x + 28, 76, x + 28, 96)
        yield box(x, 128, 56, 40, colour)
        yield say(x + 28, 114, f"{score:.2f}", "middle")
    yield say(742, 60, "index query x index key")
    yield say(742, 114, "score: the largest of its 128 tokens")
    yield say(742, 144, "keys and values in blocks of 128 tokens;")
    yield say(742, 162, "exact softmax over the chosen ones alone")
    legend = ((CHOSEN, "best scores, up to 16 in all"), (FORCED, "the newest: always"), (PLAIN, "not read"))
    for at, (colour, text) in enumerate(legend):
        yield box(10 + at * 230, 190, 16, 16, colour)
        yield say(32 + at * 230, 203, text)


PICKS = (
    ((0, 3, 6, 9), (0, 3, 6, 9), (0, 3, 5, 9), (0, 4, 5, 9)),
    ((1, 2, 7, 9), (1, 2, 7, 9), (1, 2, 8, 9), (1, 2, 8, 9)),
)


def selection() -> Iterator[str]:
    """What four consecutive tokens choose in two groups, and the union of it."""
    for group, picks in enumerate(PICKS):
        left = 90 + group * 420
        yield say(left, 24, f"KV head {group} and its 16 query heads")
        for token, picked in enumerate(picks):
            top = 40 + token * 32
            if group == 0:
                yield say(80, top + 19, f"token {token}", "end")
            for block in range(10):
                colour = FORCED if block == 9 else CHOSEN if block in picked else PLAIN
                yield box(left + block * 36, top, 34, 28, colour)
        union = sorted({block for picked in picks for block in picked})
        for block in range(10):
            yield box(left + block * 36, 184, 34, 28, QUERY if block in union else PLAIN)
        yield say(left, 234, f"{len(union)} different blocks for {sum(map(len, picks))} choices")
    yield say(80, 203, "union", "end")


def kv_outer() -> Iterator[str]:
    """Reading blocks query by query, and block by block."""
    picks = PICKS[0]
    names = ("queries outer: each loads its blocks", "KV outer: each block is loaded once, by all that chose it")
    for panel, name in enumerate(names):
        left = 20 + panel * 440
        yield say(left, 24, name)
        for token, picked in enumerate(picks):
            x = left + 30 + token * 100
            yield box(x, 44, 60, 30, QUERY)
            yield say(x + 30, 64, f"q{token}", "middle", "white")
            for block in picked:
                yield line(x + 30, 74, left + 18 + block * 40, 150, LINE if panel == 0 else CHOSEN)
        for block in range(10):
            readers = sum(block in picked for picked in picks)
            colour = PLAIN if not readers else FORCED if panel == 0 and readers > 1 else CHOSEN
            yield box(left + block * 40, 150, 36, 30, colour)
            if readers:
                yield say(left + 18 + block * 40, 198, f"{readers if panel == 0 else 1}x", "middle")
    loads = sum(map(len, picks)), len({block for picked in picks for block in picked})
    yield say(20, 228, f"{loads[0]} loads: decode and short steps")
    yield say(460, 228, f"{loads[1]} loads: prefill; a query's parts are merged by their log-sum-exp")


FIGURES = {
    "blocks.svg": (1040, 220, "Index branch and main branch of a sparse layer", blocks),
    "selection.svg": (880, 248, "Blocks chosen by four consecutive tokens in two groups", selection),
    "kv-outer.svg": (900, 244, "Loads of blocks with queries outer and with KV outer", kv_outer),
}


def draw(name: str) -> str:
    """The text of a figure's file."""
    width, height, title, parts = FIGURES[name]
    return picture(width, height, title, parts())


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for each in FIGURES:
        (FOLDER / each).write_text(draw(each))
