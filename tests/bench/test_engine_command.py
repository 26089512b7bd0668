"""Which processes a command starts, and with what."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from engine import children, command, conversations, serve
from engine.engines import ENGINES

FOLDER = Path(__file__).parents[2] / "benchmarks" / "engine"


def jobs(*words: str) -> list[tuple[int, str, tuple[str, ...]]]:
    arguments = command.parse(["run", "model", "out.json", *words])
    return [(number, name, tuple(plans)) for number, name, _, plans in command.jobs(arguments)]


def test_classes_take_turns() -> None:
    cells = ("cells",)
    assert jobs() == [(0, "ours", cells), (0, "in-tree", cells)]
    assert jobs("--rounds", "2") == [(n, name, cells) for n in (0, 1) for name in ("ours", "in-tree")]


def test_one_engine_does_all_but_serving() -> None:
    assert jobs("--only", "serve,equal,cells", "--rounds", "2") == [
        (0, "ours", ("cells", "equal")),
        (0, "in-tree", ("cells", "equal")),
        (0, "eager", ("equal",)),
        (1, "ours", ("cells",)),
        (1, "in-tree", ("cells",)),
    ]
    assert jobs("--only", "serve") == []


class FakeServers:
    """In place of servers and their client: which were up, and what was asked of which, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.up: list[str] = []
        self.asked: list[tuple[str, str]] = []
        self.broken: set[str] = set()
        monkeypatch.setattr(serve, "_server_module", lambda: self)
        monkeypatch.setattr(serve, "replay", self.replay)

    @contextlib.contextmanager
    def running(
        self, command: list[str], _flags: object, _environment: object, _limit: float, log_file: Path
    ) -> Iterator[str]:
        name = command[command.index("serve") + 1]
        said = "".join(f"line {number} of {name}\n" for number in range(serve.LAST_LINES + 1))
        log_file.write_text(f'{said}\n(APIServer pid=7) INFO:     127.0.0.1:39304 - "GET /metrics HTTP/1.1" 200 OK\n')
        if name == "broken":
            raise RuntimeError("it said why")
        self.up.append(name)
        yield name
        self.up.remove(name)

    def replay(self, model: str, server: str, dataset: list[str], *_: object) -> dict[str, float]:
        assert set(self.up) == {"a", "b"} and model == server
        self.asked.append((server, dataset[1]))
        if server in self.broken:
            raise RuntimeError("a request failed")
        return dict.fromkeys([key for _, _, key in serve.METRICS] + ["cached"], 1.0)


STARTS = {name: serve.Start({"model": name}, {}) for name in ("a", "broken", "b")}
SERVE_PLAN = serve.Plan((1,), conversations.Shape(2, 1, 128, 128), (300,))


def test_servers_stand_side_by_side_and_are_asked_in_turn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = FakeServers(monkeypatch)
    news = list(serve.measure(STARTS, SERVE_PLAN, 2, tmp_path))
    assert fake.asked == [(name, kind) for kind in ("timed_trace", "random") for name in "ab"] * 2
    assert fake.up == []
    assert ("broken", 0, "it said why") in news
    assert sum(name == "b" and isinstance(row, dict) for name, _, row in news) == 2 * 2 * (len(serve.METRICS) + 1)
    first, second = (tmp_path / f"trace-{seed}.jsonl" for seed in (0, 1))
    assert first.read_text() != second.read_text(), "a second round would find the first one's prompts in the cache"


def test_a_server_that_failed_is_asked_no_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = FakeServers(monkeypatch)
    fake.broken.add("a")
    news = list(serve.measure(STARTS, SERVE_PLAN, 1, tmp_path))
    assert [name for name, _ in fake.asked] == ["a", "b", "b"]
    (said,) = (row for name, _, row in news if name == "a" and isinstance(row, str))
    assert said.startswith("a request failed\n")
    assert f"of {tmp_path / 'a-server.log'}:\nline 1 of a\n" in said, (
        "what the server said is the reason, requests are none"
    )
    assert said.endswith(f"line {serve.LAST_LINES} of a")


def test_a_class_once_more_with_other_options() -> None:
    """What all are asked for gives way to it, and options of ours are not in-tree's."""
    words = ["--only", "equal", "--options", '{"kv": "fp8"}', "--ours-options", '{"seed": 7}']
    words += ["--also", 'plain=ours{"kv": "auto"}', "--also", 'in-tree plain=in-tree{"kv": "auto"}']
    arguments = command.parse(["run", "model", "out.json", *words])
    asked = {name: command.options_of(one, arguments) for _, name, one, _ in command.jobs(arguments)}
    assert {name: (options["kv"], options.get("seed")) for name, options in asked.items()} == {
        "ours": ("fp8", 7),
        "in-tree": ("fp8", None),
        "plain": ("auto", 7),
        "in-tree plain": ("auto", None),
        "eager": ("fp8", 7),
    }


def test_a_class_once_more_in_another_environment() -> None:
    words = [
        "--only",
        "equal",
        "--ours-options",
        '{"seed": 7}',
        "--also",
        'shared=ours{"environment": {"A": "1"}, "x": 2}',
    ]
    arguments = command.parse(["run", "model", "out.json", *words])
    one = command.classes_of(arguments)["shared"]
    assert one.environment == {"MSA_DISABLE": "0", "A": "1"} and one.is_ours
    options = command.options_of(one, arguments)
    assert options["x"] == 2 and options["seed"] == 7 and "environment" not in options


def test_plans_survive_the_way_to_the_child() -> None:
    arguments = command.parse(["run", "model", "out.json", "--only", "cells,profile,equal", "--contexts", "128,256"])
    _, _, _, plans = next(command.jobs(arguments))
    for part, plan in plans.items():
        assert children.plan(part, json.loads(json.dumps(asdict(plan)))) == plan
    assert plans["cells"].contexts == (128, 256)


def test_each_class_has_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSA_DISABLE", "1")
    for engine in ENGINES.values():
        given = {name: children.environment(engine, one) for name, one in children.classes(engine).items()}
        assert {name: one["MSA_DISABLE"] for name, one in given.items()} == {"ours": "0", "in-tree": "1", "eager": "0"}


def test_options_become_flags() -> None:
    options = {"language_model_only": True, "enable_prefix_caching": False, "max_model_len": 8, "a_b": {"c": [1]}}
    assert serve.flags(options) == [
        "--language-model-only", "--no-enable-prefix-caching", "--max-model-len", "8", "--a-b", '{"c": [1]}',
    ]  # fmt: skip


@pytest.mark.parametrize(
    "words", [["--only", "speed"], ["--classes", "theirs"], ["--cells", "tftt"], ["--also", "x=theirs{}"]]
)
def test_unknown_names_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.parse(["run", "model", "out.json", *words])
    assert f"{words[1].removeprefix('x=').removesuffix('{}')!r} is not one of" in capsys.readouterr().err


def test_only_what_is_not_timed_runs_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.parse(["run", "model", "out.json", "--only", "equal", "--at-once", "3"]).at_once == 3
    for timed in ("cells", "equal,profile"):
        with pytest.raises(SystemExit):
            command.parse(["run", "model", "out.json", "--only", timed, "--at-once", "3"])
        assert f"--at-once 3 with --only {timed} would spoil what is timed" in capsys.readouterr().err


def test_defaults_are_those_of_the_plans() -> None:
    arguments = command.parse(["run", "model", "out.json"])
    shape = conversations.Shape(arguments.conversations, arguments.turns, arguments.shared, arguments.first)
    assert shape == conversations.Shape()


@pytest.mark.parametrize("safe", ["", "1"])
def test_runs_as_a_folder(safe: str) -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER), "run", "--help"], env={"PYTHONSAFEPATH": safe}, capture_output=True, text=True
    )
    assert done.returncode == 0 and "--profile-steps" in done.stdout, done.stderr


CHILD = """\
#!{python}
import pathlib, sys
assert sys.argv[2] == "child"
print("[bench] a cell")
print("something else")
{report}
print("out of memory", file=sys.stderr)
sys.exit({status})
"""


@pytest.mark.parametrize(
    ("report", "status"), [('{"parts": {"cells": [1]}}', 0), ('{"parts": {"cells": [1]}}', 3), ("", 3)]
)
def test_what_a_child_found_and_said_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: str, status: int
) -> None:
    script = tmp_path / "python"
    write = f"pathlib.Path(sys.argv[4]).write_text({report!r})" if report else ""
    script.write_text(CHILD.format(python=sys.executable, report=write, status=status))
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    (tmp_path / "ours-report.json").write_text("of an earlier child")
    shown: list[str] = []
    found = children.run("vllm", "ours", children.Class(children.OURS), {}, {}, tmp_path, shown.append)
    assert shown == ["a cell"]
    assert found["parts"] == ({"cells": [1]} if report else {})
    assert ("failed" in found) == bool(status)
    if status:
        assert "out of memory" in found["failed"] and f"status {status}" in found["failed"]
    assert "something else" in (tmp_path / "ours.log").read_text()
