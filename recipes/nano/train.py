"""Training: the phases of the plan one after another, from wherever the run's checkpoint is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from msa_backend.tiny import TinyShape

from . import state as states
from .initial import initialise
from .lessons import Batch, batches
from .model import Mixture, Nano, Reading
from .plan import PATIENCE, Phase
from .state import State
from .text import ASKED

WARM_UP = 50
"""Steps of each phase in which the learning rate rises."""
WEIGHT_DECAY = 0.05
LARGEST_GRADIENT = 1.0
BALANCE = 1e-3
"""Of the routing bias, a step: up for experts that got less than their share, down for the others."""
NOTED_EVERY = 20
"""Steps between two rows of the loss curve, at which the host waits for the device."""
SAVED_EVERY = 60.0
"""Seconds."""


class Course:
    """A model in training.

    Args:
        run: its folder. What is there is gone on with.
        seed: of a run that begins.
        workers: processes that write lessons.
    """

    def __init__(
        self, run: Path, shape: TinyShape, plan: tuple[Phase, ...], device: torch.device, seed: int, workers: int = 0
    ) -> None:
        self.run, self.plan, self.device, self.workers = run, plan, device, workers
        self.model = Nano(shape).to(device)
        matrices = [p for name, p in self.model.named_parameters() if p.ndim > 1 and "embed" not in name]
        others = [p for name, p in self.model.named_parameters() if p.ndim == 1 or "embed" in name]
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=device.type == "cuda")
        if states.checkpoint(run).exists():
            self.state, model, optimizer = states.load(run, device)
            self.model.load_state_dict(model)
            self.optimizer.load_state_dict(optimizer)
        else:
            self.state = State(seed)
            initialise(self.model, seed)

    @property
    def phase(self) -> Phase | None:
        return self.plan[self.state.phase] if self.state.phase < len(self.plan) else None

    def save(self) -> None:
        states.save(self.run, self.state, self.model.state_dict(), self.optimizer.state_dict())

    def next_phase(self) -> None:
        self.state.phase += 1
        self.state.phase_step = 0
        self.state.recent = []

    def train(self, goes_on: Callable[[], bool], say: Callable[[str], None] = print) -> None:
        """Until the plan is through, or ``goes_on`` is no longer true. Checkpoints are written then, and on the way."""
        saved = time.monotonic()
        while self.phase is not None and goes_on():
            for _ in self.steps(self.phase, say):
                if time.monotonic() - saved > SAVED_EVERY:
                    self.save()
                    saved = time.monotonic()
                if not goes_on():
                    break
            else:
                self.next_phase()
        self.save()

    def batches(self, phase: Phase, steps: range) -> Iterator[Batch]:
        return batches(phase, self.state.seed, steps, self.workers, pinned=self.device.type == "cuda")

    def steps(self, phase: Phase, say: Callable[[str], None]) -> Iterator[None]:
        """The steps left of ``phase``, a few between two yields; it ends where the phase does."""
        state = self.state
        left = range(state.step, state.step + phase.steps - state.phase_step)
        lessons = self.batches(phase, left)
        started = time.monotonic()
        while measures := [self.step(phase, batch) for batch in islice(lessons, NOTED_EVERY)]:
            noted = torch.stack(measures).double().cpu()
            means = [round(mean, 5) for mean in noted.nanmean(0).tolist()]
            seconds = (time.monotonic() - started) / len(noted)
            started = time.monotonic()
            state.rows.append([state.step, phase.name, *means, round(seconds, 4)])
            bound = noted[:, 2]
            state.recent = (state.recent + bound[bound.isfinite()].tolist())[-PATIENCE:]
            if len(state.rows) % 10 == 0:
                say(
                    f"{state.step} {phase.name}: loss {means[0]:.3f}, right {100 * means[1]:.1f} %, "
                    f"bound {100 * means[2]:.1f} %, indexer {means[3]:.3f}, recall {100 * means[4]:.1f} %, "
                    f"{1000 * seconds:.0f} ms"
                )
            if not all(torch.isfinite(noted[:, 0])):
                raise RuntimeError(f"the loss is not finite at step {state.step}; the last checkpoint is from before")
            done = len(state.recent) == PATIENCE and sum(state.recent) / PATIENCE >= phase.until
            if done:
                return
            yield

    def step(self, phase: Phase, batch: Batch) -> Tensor:
        """One step of the optimizer; returns what the loss curve has of it, on the device."""
        batch = batch.to(self.device)
        rate = phase.lr * min(1.0, (self.state.phase_step + 1) / WARM_UP)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        reading = Reading(phase.block, phase.topk, phase.far_handicap, batch.rows)
        with autocast(self.device):
            loss, measured = read(self.model, batch, reading)
            lesson = torch.stack(reading.lessons).sum()
        (loss + lesson).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), LARGEST_GRADIENT)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._balance(reading)
        self.state.step += 1
        self.state.phase_step += 1
        return torch.cat((measured, torch.stack((lesson.detach(), torch.stack(reading.recalls).min()))))

    @torch.no_grad()
    def _balance(self, reading: Reading) -> None:
        mixtures = (module for module in self.model.modules() if isinstance(module, Mixture))
        for mixture, load in zip(mixtures, reading.loads, strict=True):
            mixture.e_score_correction_bias += BALANCE * (load.mean() - load).sign()


@contextmanager
def autocast(device: torch.device) -> Iterator[None]:
    """Where the model computes: on a GPU in bf16, with attention kernels that take a mask shared by all heads."""
    if device.type != "cuda":
        yield
        return
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with torch.autocast("cuda", torch.bfloat16), sdpa_kernel(kernels):
        yield


def read(model: Nano, batch: Batch, reading: Reading) -> tuple[Tensor, Tensor]:
    """The loss on the marked tokens, and ``[3]``: it, the share of right ones of those asked for, and of first ones."""
    hidden = model(batch.tokens, reading, batch.positions)
    logits = model.lm_head(hidden.flatten(0, 1).index_select(0, batch.before)).float()
    wanted, marks = batch.tokens.flatten()[batch.before + 1], batch.marks.flatten()
    loss = F.cross_entropy(logits, wanted, reduction="sum") / max(1, len(wanted))  # a small batch may ask for nothing
    with torch.no_grad():
        right = logits.argmax(-1) == wanted
        asked = marks[batch.before + 1] == ASKED
        first = asked & (marks[batch.before] != ASKED)
        shares = [(right & of).sum() / of.sum() for of in (asked, first)]
        return loss, torch.stack([loss.detach(), *shares])


def until(minutes: float) -> Callable[[], bool]:
    end = time.monotonic() + 60 * minutes
    return lambda: time.monotonic() < end


def rehearse(course: Course, steps: int) -> None:
    """A few steps of every phase, at full size, with what each takes; nothing is kept."""
    for number, phase in enumerate(course.plan):
        course.state.phase, course.state.phase_step = number, 0
        if course.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        lessons = course.batches(phase, range(steps))
        started, seconds = time.monotonic(), []
        for batch in lessons:
            measured = course.step(phase, batch).tolist()
            seconds.append(time.monotonic() - started)
            started = time.monotonic()
        memory = torch.cuda.max_memory_allocated() / 1e9 if course.device.type == "cuda" else float("nan")
        print(
            f"{phase.name}: loss {measured[0]:.3f}, {1000 * min(seconds):.0f} ms a step, so up to "
            f"{phase.steps * min(seconds):.0f} s in all; {memory:.1f} GB",
            flush=True,
        )
