"""The command line, end to end on the real sizes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nano import command
from nano.evaluate import MANNERS, verdicts
from nano.plan import PLAN, Phase
from nano.shape import NANO
from nano.text import Kind

RECIPE = Path(__file__).parents[2] / "recipes" / "nano"


@pytest.fixture(autouse=True)
def short_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tuple(Phase(phase.name, Kind(128, plain=1.0, facts=3), 1, 3, 1e-3) for phase in PLAN[:3])
    monkeypatch.setattr(command, "PLAN", plan)


def test_train_evaluate_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = str(tmp_path / "run")
    assert command.main(["train", run, "--device", "cpu", "--minutes", "0"]) == 0
    assert "stopped in 'bind'" in capsys.readouterr().out
    assert command.main(["train", run, "--device", "cpu"]) == 0
    assert "the plan is through" in capsys.readouterr().out
    found = tmp_path / "found.json"
    options = ["--device", "cpu", "--lengths", "300", "--repeats", "1", "--json", str(found)]
    assert command.main(["evaluate", run, *options]) == 1, "nine steps teach nothing"
    assert "needle at 300 tokens, as trained: 0.0 %, less than 99" in capsys.readouterr().out
    assert found.exists()
    assert command.main(["export", run, str(tmp_path / "exported")]) == 0
    weights = tmp_path / "exported" / "model.safetensors"
    assert 15e6 < weights.stat().st_size < 20e6
    later = [str(tmp_path / "later"), "--device", "cpu", "--minutes", "0", "--weights", str(tmp_path / "exported")]
    assert command.main(["train", *later, "--phase", "ask"]) == 0
    weights = [torch.load(tmp_path / name / "checkpoint.pt")["model"] for name in ("run", "later")]
    for name, weight in weights[0].items():
        assert torch.equal(weight.bfloat16(), weights[1][name].bfloat16()), name
    capsys.readouterr()
    assert command.main(["train", run, "--device", "cpu", "--weights", str(tmp_path / "exported")]) == 2
    assert "--weights is for one that begins" in capsys.readouterr().err
    assert command.main(["export", run, str(tmp_path / "exported")]) == 2
    assert "not an empty folder" in capsys.readouterr().err


def test_phases_can_be_left_early_and_not_gone_back_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["train", str(tmp_path), "--device", "cpu", "--minutes", "0", "--phase"]
    assert command.main([*options, "ask"]) == 0
    assert "stopped in 'ask'" in capsys.readouterr().out
    assert command.main([*options, "bind"]) == 2
    assert "the run is in phase 'ask', after 'bind'" in capsys.readouterr().err


def test_a_rehearsal_keeps_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert command.main(["train", str(tmp_path), "--device", "cpu", "--rehearse", "1"]) == 0
    out = capsys.readouterr().out
    assert all(f"{phase.name}: loss" in out for phase in PLAN[:3])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["evaluate", "nowhere"], "nowhere has no checkpoint; train the run first"),
        (["export", "nowhere", "away"], "nowhere has no checkpoint; train the run first"),
        (["train", "nowhere", "--device", "cpu", "--weights", "."], "name a checkpoint that the recipe exported"),
        (["train", "nowhere", "--device", "tpu"], "the device is 'tpu', but must be cpu or cuda"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
):
    assert command.main(arguments) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert command.main(["train", str(tmp_path), "--device", "cuda"]) == 2
    assert "torch sees none; pass --device cpu" in capsys.readouterr().err


def test_it_starts_by_its_path():
    done = subprocess.run([sys.executable, str(RECIPE), "--help"], capture_output=True, text=True, check=True)
    assert "evaluate" in done.stdout


def test_verdicts():
    def result(manner: str, task: str, score: float) -> dict[str, object]:
        return {"length": 4096, "manner": manner, "task": task, "score": score}

    good = [
        result("as trained", "needle", 1.0),
        result("as trained", "two-hop", 0.96),
        result("as trained", "many", 0.0),
    ]
    good += [result(name, how.fails, 0.2) for name, how in MANNERS.items() if how.fails]
    good += [result("top-k 4", "needle", 1.0)]
    assert list(verdicts(good)) == []
    assert len(list(verdicts([result("as trained", "needle", 0.98), result("as trained", "two-hop", 0.9)]))) == 2
    assert len(list(verdicts([result(name, how.fails, 0.6) for name, how in MANNERS.items() if how.fails]))) == 3


def test_the_model_is_what_was_ordered():
    assert NANO.topk == 16 and NANO.heads == 16 * NANO.kv_heads and NANO.max_positions == 1 << 20
    assert not NANO.sparse_attention[0] and not NANO.moe[0]
    assert all(NANO.sparse_attention[1:]) and all(NANO.moe[1:])
