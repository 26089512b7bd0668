"""The probe against a server whose sight is known."""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path
from typing import Any

import pytest

from msa_backend import cli
from msa_backend.probe import client, command
from msa_backend.probe.tasks import TASKS, Place

from .server import Fake, serving

EVERY = [*TASKS, "boundary"]
SHORT = ("--lengths", "500,1K", "--depths", "0,50,100")


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PAUSE", 0.0)


def probe(fake: Fake, *options: str) -> int:
    with serving(fake) as url:
        return cli.main(["probe", url, *options])


def cells(path: Path) -> dict[str, dict[str, Any]]:
    return json.loads(path.read_text())["cells"]


@pytest.mark.parametrize("task", EVERY)
def test_a_server_that_sees_everything(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    fake = Fake()
    assert probe(fake, "--tasks", task, *SHORT, "--json", str(tmp_path / "out.json")) == 0
    found = cells(tmp_path / "out.json")
    assert len(found) == 2 * (4 if task == "boundary" else 3)
    assert {cell["score"] for cell in found.values()} == {cell["score_cached"] for cell in found.values()} == {1.0}
    for cell in found.values():
        assert cell["cached_tokens"] == cell["prompt_tokens"]
        # Sentences are whole, and other tasks have more facts than the one by which lengths are calibrated.
        assert cell["prompt_tokens"] == pytest.approx(cell["length"], rel=0.05, abs=120)
    assert f"{task:<12}100.0 %" in capsys.readouterr().out


@pytest.mark.parametrize("task", ["needle", "transcript"])
def test_a_server_that_sees_the_end(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "out.json"
    assert probe(Fake(sees=0.4), "--tasks", task, *SHORT, "--json", str(path)) == 1
    assert {(cell["depth"], cell["score"]) for cell in cells(path).values()} == {(0.0, 0.0), (0.5, 0.0), (1.0, 1.0)}
    assert f"{task:<12} 33.3 %, below 95" in capsys.readouterr().out


def test_half_of_a_two_hop_is_nothing(tmp_path: Path):
    """At depth 0 and 50 the other fact stands where this server does not look, at 100 it stands in the middle."""
    path = tmp_path / "out.json"
    assert probe(Fake(sees=0.6), "--tasks", "two-hop", *SHORT, "--json", str(path)) == 1
    assert {(cell["depth"], cell["score"]) for cell in cells(path).values()} == {(0.0, 0.0), (0.5, 0.0), (1.0, 1.0)}


def test_a_share_of_many(tmp_path: Path):
    path = tmp_path / "out.json"
    probe(Fake(sees=0.5), "--tasks", "many", *SHORT, "--json", str(path))
    assert all(0.2 < cell["score"] < 0.8 for cell in cells(path).values())


def test_a_roll_call_takes_the_whole_text(tmp_path: Path):
    """Who sees half of it guesses among those who were not heard there."""
    path = tmp_path / "out.json"
    assert probe(Fake(sees=0.5), "--tasks", "roll-call", *SHORT, "--repeats", "4", "--json", str(path)) == 1
    assert statistics.fmean(cell["score"] for cell in cells(path).values()) < 0.5


def test_a_server_whose_prefix_cache_is_broken(tmp_path: Path):
    path = tmp_path / "out.json"
    assert probe(Fake(forgets=True), *SHORT, "--json", str(path)) == 1
    assert {(cell["score"], cell["score_cached"]) for cell in cells(path).values()} == {(1.0, 0.0)}
    assert probe(Fake(forgets=True), *SHORT, "--cold-only") == 0


def test_an_interrupted_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "out.json"
    options = ("--lengths", "500", "--cold-only", "--json", str(path))
    # Two requests calibrate.
    assert probe(Fake(dies_after=5), *options) == 2
    assert "answered 400" in capsys.readouterr().err
    assert len(cells(path)) == 3
    fake = Fake()
    assert probe(fake, *options) == 0
    assert len(fake.asked) == 2 + 2
    assert len(cells(path)) == 5
    fake = Fake()
    assert probe(fake, *options) == 0
    assert not fake.asked


def test_results_of_another_run_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "out.json"
    options = ("--lengths", "500", "--json", str(path))
    assert probe(Fake(), *options) == 0
    before = path.read_text()
    assert probe(Fake(), *options, "--seed", "1") == 2
    assert "name another with --json" in capsys.readouterr().err
    assert path.read_text() == before
    path.write_text("not JSON")
    assert probe(Fake(), *options) == 2
    assert "holds no results of a probe" in capsys.readouterr().err


def test_a_server_that_is_busy_is_asked_again():
    assert probe(Fake(failures=[503, 429]), "--lengths", "500", "--depths", "50") == 0


def test_several_at_a_time_say_the_same(tmp_path: Path):
    scores = []
    for number in ("1", "4"):
        path = tmp_path / f"{number}.json"
        probe(Fake(sees=0.4), *SHORT, "--concurrency", number, "--json", str(path))
        scores.append({key: cell["score"] for key, cell in cells(path).items()})
    assert scores[0] == scores[1]


@pytest.mark.parametrize(
    ("fake", "options", "says"),
    [
        (Fake(failures=[503] * 3), ("--lengths", "500"), "answered 503"),
        (Fake(), ("--lengths", "500", "--model", "other"), "--model is other, but the server lists fake"),
        (Fake(limit=None), (), "does not say how long its prompts may be; pass --lengths"),
    ],
)
def test_servers_that_cannot_be_probed(
    fake: Fake, options: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
):
    assert probe(fake, *options) == 2
    said = capsys.readouterr().err
    assert said.startswith("msa-backend probe: ")
    assert says in said


def test_nobody_there(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["probe", "http://127.0.0.1:9", "--retries", "0"]) == 2
    assert "gave no answer" in capsys.readouterr().err


@pytest.mark.parametrize(("limit", "lengths"), [(20_000, [4096, 8192, 16_384]), (40_000, [4096, 8192, 16_384, 32_768]),
                                               (50_000, [4096, 8192, 16_384, 32_768, 47_013]),
                                                (2048, [1536])])  # fmt: skip
def test_lengths_double_to_the_limit(limit: int, lengths: list[int]):
    assert command._up_to(limit) == lengths


@pytest.mark.parametrize("offset", [0, 64, 126, 127])
def test_facts_at_block_boundaries(offset: int):
    """The server gets exactly so many tokens, and the fact begins where it is to."""
    fake = Fake()
    assert probe(fake, "--tasks", "boundary", "--lengths", "1024", "--cold-only") == 0
    prompts = {len(ids): fake.text(ids) for ids in fake.ids}
    assert set(prompts) == {1024}
    begins = set()
    for ids in fake.ids:
        before = fake.text(ids).index(" The access code of")
        begins.add(next(i for i in range(len(ids)) if len(fake.text(ids[:i])) == before) % 128)
    assert offset in begins


@pytest.mark.parametrize("task", TASKS)
def test_codes_stand_nowhere_else(task: str):
    for seed in range(5):
        made = TASKS[task](random.Random(seed), Place(3000, 0.3))
        assert all(made.text.count(code) == 1 for code in made.codes)
        assert made.score("I do not know") == 0
        assert made.score(" ".join(made.codes)) == 1
        assert made.text != TASKS[task](random.Random(seed + 100), Place(3000, 0.3)).text
        assert made.text[:25] != TASKS[task](random.Random(seed + 100), Place(3000, 0.3)).text[:25]


def test_a_plot(tmp_path: Path):
    pytest.importorskip("matplotlib")
    assert probe(Fake(), *SHORT, "--plot", str(tmp_path / "map.png")) == 0
    assert (tmp_path / "map.png").stat().st_size > 1000


@pytest.mark.parametrize("options", [("--tasks", "haystack"), ("--depths", "110")])
def test_wrong_options_are_usage_errors(options: tuple[str, str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        cli.main(["probe", "http://127.0.0.1:9", *options])
    assert ended.value.code == 2
