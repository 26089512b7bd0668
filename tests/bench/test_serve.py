"""``msa-backend bench serve``: what it asks the client and makes of its answers; ``tests/vllm/api`` runs the client."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from msa_backend import cli
from msa_backend.bench import serve

SERVERS = ["a=http://h:1", "b=http://h:2"]
SPEED = {"http://h:1": 2.0, "http://h:2": 1.0}


class Client:
    """In place of the client: answers by the server's speed and the round, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, str]] = []
        self.completed = 1.0

    def __call__(self, command: Sequence[str], **_: Any) -> subprocess.CompletedProcess[str]:
        words = list(command)[len(serve.CLIENT) :]
        options = {word: value for word, value in zip(words, [*words[1:], ""], strict=True) if word.startswith("--")}
        self.asked.append(options)
        if options["--base-url"] not in SPEED:
            return subprocess.CompletedProcess(command, 1, "a trace\nno such server")
        speed = SPEED[options["--base-url"]]
        rounds = sum(asked["--base-url"] == options["--base-url"] for asked in self.asked)
        noise = (2, 1, 9)[rounds % 3]
        found = dict.fromkeys(serve.FIGURES.values(), noise * 100 / speed) | {"output_throughput": 50 * speed}
        found["completed"] = int(options["--num-prompts"]) * self.completed
        Path(options["--result-dir"], options["--result-filename"]).write_text(json.dumps(found))
        return subprocess.CompletedProcess(command, 0, "")


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Client:
    found = Client()
    monkeypatch.setattr(serve.subprocess, "run", found)
    monkeypatch.setattr(serve, "find_spec", lambda name: object())
    return found


def test_servers_are_asked_the_same_in_turn(client: Client):
    words = ["--lengths", "1K,2K", "--concurrency", "1,8", "--rounds", "2", "--seed", "7", "--output", "5"]
    assert cli.main(["bench", "serve", *SERVERS, *words]) == 0
    assert [asked["--base-url"] for asked in client.asked] == ["http://h:1", "http://h:2"] * 8
    pairs = [
        {key: value for key, value in asked.items() if key not in ("--base-url", "--result-dir")}
        for asked in client.asked
    ]
    assert pairs[::2] == pairs[1::2]
    assert [asked["--seed"] for asked in pairs[::2]] == [str(7 + number) for number in range(1, 9)]  # none twice
    assert [(p["--random-input-len"], p["--max-concurrency"], p["--num-prompts"]) for p in pairs[::4]] == [
        ("1024", "1", "4"), ("1024", "8", "16"), ("2048", "1", "4"), ("2048", "8", "16")
    ]  # fmt: skip
    assert {asked["--random-output-len"] for asked in pairs} == {"5"}


def test_prompts_differ_from_one_run_to_the_next(client: Client):
    for _ in range(2):
        cli.main(["bench", "serve", *SERVERS, "--lengths", "1K", "--concurrency", "1", "--rounds", "1"])
    assert client.asked[0]["--seed"] != client.asked[2]["--seed"]


def test_the_table_and_the_file(client: Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out.json"
    words = ["--lengths", "1K", "--concurrency", "2", "--rounds", "3", "--json", str(out)]
    assert cli.main(["bench", "serve", *SERVERS, *words]) == 0
    rows = {
        line[20:38].strip(): line.split()[-3:] for line in capsys.readouterr().out.splitlines() if "1,024   " in line
    }
    assert rows["TTFT p50, ms"] == ["100", "200", "(0.50x)"]  # of three rounds, 50, 100 and 450 for the first
    assert rows["output, tokens/s"] == ["100", "50", "(0.50x)"]
    (cell,) = json.loads(out.read_text())["cells"]
    assert (cell["tokens"], cell["concurrency"]) == (1024, 2)
    assert cell["servers"]["b"]["output, tokens/s"] == 50


@pytest.mark.parametrize(
    ("servers", "says"),
    [
        (["a=http://h:1", "a=http://h:2"], "two servers have the same name"),
        (["a=http://h:1", "b=http://h:1/"], "two names have the same URL"),
        (["a=http://h:9"], "vllm bench serve failed with a at http://h:9 (no such server)"),
    ],
)
def test_refusals(servers: list[str], says: str, client: Client, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["bench", "serve", *servers, "--lengths", "1K"]) == 2
    assert says in capsys.readouterr().err


def test_requests_that_fail(client: Client, capsys: pytest.CaptureFixture[str]):
    client.completed = 0.5
    assert cli.main(["bench", "serve", *SERVERS, "--lengths", "1K"]) == 2
    assert "a answered 2.0 of 4 requests; look in its log" in capsys.readouterr().err


def test_a_server_without_a_name(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        cli.main(["bench", "serve", "http://h:1"])
    assert "is no NAME=URL" in capsys.readouterr().err


def test_the_plot(tmp_path: Path):
    pytest.importorskip("matplotlib")
    figures = dict.fromkeys(serve.FIGURES, 1.0)
    found = {serve.Cell(tokens, 1): {"a": figures, "b": figures} for tokens in (1024, 2048)}
    serve.plot(["a", "b"], found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
