"""A run goes on as if it had not been interrupted, and learns."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from nano import state as states
from nano import train as training
from nano.lessons import ROWS, batch, batches
from nano.plan import Phase
from nano.text import ASKED, Kind
from nano.train import Course, until

from .small import PLAN, SMALL

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "NOTED_EVERY", 5)
    monkeypatch.setattr(training, "WARM_UP", 5)


def course(run: Path, plan: tuple[Phase, ...] = PLAN, seed: int = 0) -> Course:
    return Course(run, SMALL, plan, CPU, seed)


def steps(course: Course, count: int) -> None:
    """Train until so many steps of all are made."""
    course.train(lambda: course.state.step < count, lambda line: None)


def same(one: Course, other: Course) -> bool:
    weights = zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in weights)


def test_a_run_goes_on_to_the_bit(tmp_path: Path):
    whole = course(tmp_path / "whole")
    steps(whole, 55)
    # Interrupted in the first phase, at its end, and in the second.
    for stop in (20, 40, 50, 55):
        part = course(tmp_path / "part")
        steps(part, stop)
        assert part.state.step == stop
    assert part.state.phase == whole.state.phase == 1
    assert same(part, whole)
    moments = [c.optimizer.state_dict()["state"] for c in (part, whole)]
    assert all(torch.equal(moments[0][n]["exp_avg"], moments[1][n]["exp_avg"]) for n in moments[0])
    curves = [[row[:-1] for row in c.state.rows] for c in (part, whole)]
    assert curves[0] == curves[1] and len(curves[0]) == 11


def test_other_seeds_are_other_runs(tmp_path: Path):
    one, other = course(tmp_path / "a", seed=1), course(tmp_path / "b", seed=2)
    assert not same(one, other)
    assert not torch.equal(batch(PLAN[0], 1, 0).tokens, batch(PLAN[0], 2, 0).tokens)


def test_the_seed_of_a_run_stays_its_own(tmp_path: Path):
    steps(course(tmp_path, seed=1), 5)
    assert course(tmp_path, seed=2).state.seed == 1


def test_a_plan_that_is_through_stays_so(tmp_path: Path):
    plan = (replace(PLAN[0], steps=10),)
    steps(course(tmp_path, plan), 1000)
    again = course(tmp_path, plan)
    assert again.phase is None and again.state.step == 10
    before = again.model.state_dict()["norm.weight"].clone()
    steps(again, 1000)
    assert again.state.step == 10 and torch.equal(again.model.state_dict()["norm.weight"], before)


def test_a_phase_ends_when_it_is_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(training, "PATIENCE", 10)
    easy = Phase("easy", Kind(128, plain=1.0, facts=3), 2, 1000, 1e-3, until=0.0)
    run = course(tmp_path, (easy, replace(easy, name="easy too"), PLAN[1]))
    steps(run, 25)
    assert run.state.phase == 2 and run.state.phase_step == 5
    assert [row[1] for row in run.state.rows] == ["easy", "easy", "easy too", "easy too", "second"]


def test_time_ends_a_run_and_keeps_it(tmp_path: Path):
    course(tmp_path).train(until(0.0), lambda line: None)
    assert states.checkpoint(tmp_path).exists()


def test_the_curve_is_a_table(tmp_path: Path):
    steps(course(tmp_path), 10)
    with (tmp_path / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["5", "10"]
    assert set(rows[0]) == set(states.COLUMNS)
    assert all(0 <= float(row[share]) <= 1 for row in rows for share in ("right", "bound", "recall"))


def test_a_broken_write_leaves_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = course(tmp_path)
    steps(run, 5)
    before = states.checkpoint(tmp_path).read_bytes()

    def dies(content: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("no space")

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(OSError, match="no space"):
        run.save()
    assert states.checkpoint(tmp_path).read_bytes() == before
    assert course(tmp_path).state.step == 5


def test_a_loss_that_is_no_number_is_not_kept(tmp_path: Path):
    run = course(tmp_path)
    steps(run, 5)
    with torch.no_grad():
        run.model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="not finite"):
        steps(run, 20)
    assert course(tmp_path).model.lm_head.weight.isfinite().all()


def test_a_small_batch_is_learned_by_heart(tmp_path: Path):
    """The optimizer, the loss and the marks fit together."""
    run = course(tmp_path)
    phase = Phase("one", Kind(128, plain=1.0, facts=3), 2, 100, 3e-3)
    lesson = batch(phase, 0, 0)
    losses = [run.step(phase, lesson)[0].item() for _ in range(60)]
    assert losses[-1] < 0.2 < 3 < losses[0]


@pytest.mark.parametrize("phase", PLAN, ids=[phase.name for phase in PLAN])
def test_bf16_is_what_fp32_is(phase: Phase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As on a GPU: weights in fp32, products in bf16, the residual stream in bf16."""
    lesson = batch(phase, 0, 0)
    plain = course(tmp_path / "plain").step(phase, lesson)
    monkeypatch.setattr(training, "autocast", lambda device: torch.autocast(device.type, torch.bfloat16))
    run = course(tmp_path / "mixed")
    kept: list[torch.dtype] = []
    run.model.norm.register_forward_hook(lambda module, inputs, _: kept.append(inputs[0].dtype))
    mixed = run.step(phase, lesson)
    assert kept == [torch.bfloat16]
    assert mixed.dtype == torch.float32 and (mixed[[0, 3]] - plain[[0, 3]]).abs().max() < 0.1
    assert all(p.dtype == torch.float32 for p in run.model.parameters())


def test_batches_say_where_answers_are():
    found = batch(PLAN[1], 0, 7)
    marked = found.marks.flatten()[found.before + 1]
    assert len(found.before) == (found.marks[:, 1:] > 0).sum() and (marked > 0).all()
    assert found.rows.shape == (2, ROWS) and (found.rows.diff() > 0).all()
    asking = (found.marks.roll(-1, 1) > 0).float()
    assert asking.gather(1, found.rows).mean() > 1.5 * asking.mean()
    assert (found.marks == ASKED).any()


def test_who_writes_the_lessons_does_not_matter():
    alone, helped = (list(batches(PLAN[1], 3, range(2, 7), workers)) for workers in (0, 2))
    assert len(alone) == len(helped) == 5
    for one, other in zip(alone, helped, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert list(batches(PLAN[1], 3, range(2, 2), 2)) == []


def test_routing_is_balanced(tmp_path: Path):
    """An expert that nobody chooses gets a higher bias, the others a lower or the same."""
    run = course(tmp_path)
    mixture = run.model.layers[1].mlp
    mixture.e_score_correction_bias[0] = -10.0
    run.step(PLAN[0], batch(PLAN[0], 0, 0))
    bias = mixture.e_score_correction_bias
    assert bias[0] == -10.0 + training.BALANCE and bias[1:].max() <= training.BALANCE
