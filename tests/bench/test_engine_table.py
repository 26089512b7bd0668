"""The table of two classes: which figure stands for a cell, and where the first class is marked as slower."""

from __future__ import annotations

from typing import Any

from engine import record, table


def cell(name: str, values: list[float], clock: str = "wall", unit: str = "ms") -> dict[str, Any]:
    return {"cell": name, "clock": clock, "unit": unit, "values": values}


def lines(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> list[str]:
    return list(table.lines(table.rows({"ours": [ours], "in-tree": [theirs]}), ["ours", "in-tree"]))


def test_samples_of_all_runs_stand_together() -> None:
    runs = {"ours": [[cell("a", [5, 1])], [cell("a", [2, 9])]], "in-tree": [[cell("a", [4])]]}
    (row,) = table.rows(runs)
    assert row.values == {"ours": 2, "in-tree": 4}
    assert row.spread == {"ours": (1, 9), "in-tree": (4, 4)}
    assert row.ratio("ours", "in-tree") == 2


def test_clocks_of_a_cell_are_apart() -> None:
    rows = table.rows({"ours": [[cell("a", [1], "engine"), cell("a", [3], "GPU")]]})
    assert [(row.clock, row.values["ours"]) for row in rows] == [("engine", 1), ("GPU", 3)]


def test_slower_is_marked_and_counted() -> None:
    ours = [cell("win", [10]), cell("loss", [10]), cell("draw", [10.02])]
    theirs = [cell("win", [20]), cell("loss", [9]), cell("draw", [10])]
    head, win, loss, draw, count = lines(ours, theirs)
    assert "to in-tree" in head
    assert "2.00x" in win and table.WORSE not in win
    assert "0.90x" in loss and loss.endswith(table.WORSE)
    assert "1.00x" in draw and table.WORSE not in draw
    assert count == "ours against in-tree: slower in 1 of 3 figures"


def test_of_a_rate_more_is_better() -> None:
    _, tokens, share, count = lines(
        [cell("serve", [50], "output", "tokens/s"), cell("serve", [96], "cached", "%")],
        [cell("serve", [100], "output", "tokens/s"), cell("serve", [95], "cached", "%")],
    )
    assert "0.50x" in tokens and table.WORSE in tokens
    assert "x" not in share.split("%")[1]
    assert "1 of 1" in count


def test_what_was_skipped_says_why() -> None:
    skipped = {"cell": "a", "clock": "wall", "skipped": "not within 5 s"}
    _, line, count = lines([skipped], [cell("a", [1])])
    assert "ours: not within 5 s" in line and "0 of 0" in count
    (row,) = table.rows({"ours": [[skipped], [cell("a", [1])]]})
    assert row.values == {"ours": 1} and not row.skipped


def test_records_join() -> None:
    def finished(date: str, value: float) -> dict[str, Any]:
        runs = [
            {"class": name, "round": 0, "seconds": 1, "parts": {"cells": [cell("a", [value + shift])]}}
            for name, shift in (("ours", 0), ("in-tree", 1))
        ]
        header = {"what": record.WHAT, "command": "run", "date": date, "device": "H200", "versions": {"vllm": "0.33.0"}}
        return record.finished(header | {"runs": runs})

    joined = record.joined([finished("today", 1), finished("tomorrow", 0.5)])
    assert joined["date"] == ["today", "tomorrow"] and joined["device"] == "H200"
    (row,) = joined["table"]
    assert row["spread"] == {"ours": (0.5, 1), "in-tree": (1.5, 2)}
    assert any("slower in 0 of 1" in line for line in record.lines(joined))


def test_a_failed_run_is_reported_and_its_rows_are_kept() -> None:
    run = {
        "class": "ours",
        "round": 0,
        "seconds": 1,
        "parts": {"cells": [cell("a", [1])]},
        "failed": "x\nout of memory",
    }
    found = record.finished({"device": "H200", "versions": {}, "runs": [run]})
    said = "\n".join(record.lines(found))
    assert "FAILED" in said and "out of memory" in said and found["table"][0]["values"] == {"ours": 1}
