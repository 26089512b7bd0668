"""``python recipes/nano``: the command line."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from msa_backend.config import MSAError
from msa_backend.sizes import sizes

from . import evaluate as evaluation
from .export import export
from .export import load as load_weights
from .lessons import spare_cores
from .model import Nano
from .plan import PLAN
from .shape import NANO
from .state import checkpoint, load
from .train import Course, autocast, rehearse, until


class NanoError(MSAError):
    """The command cannot be done. The message is one sentence to act on."""


def main(arguments: list[str] | None = None) -> int:
    """0 if all is well, 1 if the model cannot do what it is to, 2 with a sentence on stderr if nothing was done."""
    options = _parser().parse_args(arguments)
    try:
        return options.run_command(options)
    except MSAError as error:
        print(f"recipes/nano: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="recipes/nano", description="Train a nano MiniMax-M3 that retrieves.")
    commands = parser.add_subparsers(required=True)

    train = commands.add_parser("train", help="begin a run, or go on with it from its checkpoint")
    train.add_argument("run", type=Path, help="folder of the run")
    train.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    train.add_argument("--minutes", type=float, default=9.0, help="stop after so many (default: %(default)s)")
    train.add_argument("--seed", type=int, default=0, help="of a run that begins (default: %(default)s)")
    train.add_argument(
        "--workers", type=int, default=spare_cores(), metavar="N", help="that write texts (default here: %(default)s)"
    )
    train.add_argument("--rehearse", type=int, metavar="N", help="only N steps of each phase; nothing is kept")
    names = [phase.name for phase in PLAN]
    train.add_argument("--phase", choices=names, help="end the present phase early, and go on with this later one")
    train.add_argument("--weights", type=Path, metavar="DIR", help="begin a run with those of an exported checkpoint")
    train.set_defaults(run_command=_train)

    judge = commands.add_parser("evaluate", help="ask a run's model what the probe asks, also with broken selection")
    judge.add_argument("run", type=Path)
    judge.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    judge.add_argument("--lengths", type=sizes, default=[4096, 32768], metavar="N,...", help="(default: 4K,32K)")
    judge.add_argument("--repeats", type=int, default=4, help="prompts per depth (default: %(default)s)")
    judge.add_argument("--json", type=Path, metavar="FILE")
    judge.set_defaults(run_command=_evaluate)

    write = commands.add_parser("export", help="write a run's model as a checkpoint that engines load")
    write.add_argument("run", type=Path)
    write.add_argument("directory", type=Path)
    write.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    write.set_defaults(run_command=_export)
    return parser


def _train(options: argparse.Namespace) -> int:
    device = _device(options.device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False  # index scores decide by comparing
    course = Course(options.run, NANO, PLAN, device, options.seed, options.workers)
    if options.rehearse:
        rehearse(course, options.rehearse)
        return 0
    if options.weights:
        if course.state.step:
            raise NanoError(f"{options.run} has a run in it; --weights is for one that begins, in another folder")
        try:
            course.model.load_state_dict(load_weights(options.weights, NANO))
        except ValueError as error:
            raise NanoError(str(error)) from None
    if options.phase:
        later = [phase.name for phase in PLAN].index(options.phase)
        if later < course.state.phase:
            raise NanoError(f"the run is in phase {PLAN[course.state.phase].name!r}, after {options.phase!r}")
        while course.state.phase < later:
            course.next_phase()
    course.train(until(options.minutes), lambda line: print(line, flush=True))
    phase = course.phase
    print("the plan is through" if phase is None else f"stopped in {phase.name!r}; the same command goes on from here")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    device = _device(options.device)
    model = _model(options.run, device)
    found = []
    with autocast(device):
        for result in evaluation.evaluate(model, options.lengths, options.repeats):
            found.append(result)
            print(
                f"{result['length']:>8} {result['manner']:<22}{result['task']:<12}{100 * result['score']:5.1f} %",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    failures = list(evaluation.verdicts(found))
    print("\n".join(failures or ["all as it must be"]))
    return int(bool(failures))


def _export(options: argparse.Namespace) -> int:
    if options.directory.exists() and (not options.directory.is_dir() or any(options.directory.iterdir())):
        raise NanoError(f"{options.directory} is there and not an empty folder; name another")
    model = _model(options.run, torch.device("cpu"))
    export(model, options.directory, options.dtype)
    size = (options.directory / "model.safetensors").stat().st_size
    print(f"{options.directory}: {size / 1e6:.1f} MB of weights")
    return 0


def _model(run: Path, device: torch.device) -> Nano:
    if not checkpoint(run).exists():
        raise NanoError(f"{run} has no checkpoint; train the run first")
    _, weights, _ = load(run, device)
    model = Nano(NANO).to(device)
    model.load_state_dict(weights)
    return model


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise NanoError(f"the device is {name!r}, but must be cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise NanoError(f"the device is {name!r}, but must be cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise NanoError("the device is 'cuda', but torch sees none; pass --device cpu")
    return device
