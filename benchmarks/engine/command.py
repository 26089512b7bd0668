"""Our model class and the engine's own in the same engine on the same files: how long does a user wait?

    python benchmarks/engine write MODEL                          # 20 layers, released attention, random weights
    python benchmarks/engine run MODEL out.json                   # both classes, one table
    python benchmarks/engine run MODEL out.json --only profile    # kernels and GPU time of a step
    python benchmarks/engine run MODEL out.json --only equal      # do they say the same? with graphs and without
    python benchmarks/engine run MODEL out.json --only serve      # `vllm bench serve` on conversations
    python benchmarks/engine run MODEL out.json --engine sglang   # any of them in SGLang, but for serve
    python benchmarks/engine table out.json more.json             # several results as one

Each class runs in a process of its own, one after the other, with the engine's defaults but for --max-model-len and
what --options says; the settings that it resolved are in the JSON. In this repository's folder set PYTHONSAFEPATH=1.
A class with other options than the rest is one more class. How far fp8 caches move log-probabilities, for example,
beside how far the two classes are apart without them:

    python benchmarks/engine run MODEL out.json --only equal
        --options '{"kv_cache_dtype": "fp8", "attention_config": {"indexer_kv_dtype": "fp8"}}'
        --also 'bf16=ours{"kv_cache_dtype": "auto", "attention_config": {}}'
        --also 'in-tree bf16=in-tree{"kv_cache_dtype": "auto", "attention_config": {}}'

To see on a CPU that it works, in a minute, with a model of `msa-backend tiny`:

    python benchmarks/engine run TINY out.json --classes ours --contexts 512 --suffixes 64 --batches 1,2 --repeats 1
        --max-model-len 2048 --options '{"enforce_eager": true}'
    SGLANG_USE_CPU_ENGINE=1 python benchmarks/engine run TINY out.json --engine sglang --classes ours --contexts 512
        --suffixes 64 --batches 1,2 --repeats 1 --max-model-len 2048
        --options '{"device": "cpu", "max_total_tokens": 16384}'
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from engine import cells, checkpoint, children, conversations, equal, machine, profile, record, serve
from engine.engines import ENGINES

PARTS = (*children.PARTS, "serve")


def main() -> int:
    arguments = parse(sys.argv[1:])
    if arguments.step == "write":
        checkpoint.write(arguments.model, arguments.layers, arguments.quantization)
        if arguments.cache_scales:
            checkpoint.add_cache_scales(arguments.model, arguments.layers)
        return 0
    if arguments.step == "child":
        children.work(arguments.job, arguments.report)
        return 0
    if arguments.step == "table":
        found = record.joined([json.loads(file.read_text()) for file in arguments.files])
    else:
        found = run(arguments)
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(record.lines(found)))
    return 1 if record.failures(found) else 0


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/engine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = parser.add_subparsers(dest="step", required=True, metavar="{write,run,table}")
    writing = steps.add_parser("write", help="write the model")
    writing.add_argument("model", type=Path)
    writing.add_argument("--layers", type=int, default=checkpoint.LAYERS, help="the first is dense; %(default)s")
    writing.add_argument("--quantization", help="mxfp8 or fp8, as `msa-backend tiny` writes them")
    writing.add_argument("--cache-scales", action="store_true", help="with scales of an fp8 cache in every layer")
    child = steps.add_parser("child")  # what `run` starts for each class
    child.add_argument("job", type=Path)
    child.add_argument("report", type=Path)
    showing = steps.add_parser("table", help="the tables of one or more results, samples of the same cell together")
    showing.add_argument("files", type=Path, nargs="+")
    showing.add_argument("--out", type=Path, help="write the joined result here")
    add_run(steps.add_parser("run", help="measure", formatter_class=argparse.ArgumentDefaultsHelpFormatter))
    arguments = parser.parse_args(words)
    for part in getattr(arguments, "only", ()):
        if reason := ENGINES[arguments.engine].lacks.get(part):
            parser.error(f"--only {part} does not go with --engine {arguments.engine}: {reason}; leave it out")
    return arguments


def add_run(running: argparse.ArgumentParser) -> None:
    running.add_argument("model", help="a folder that `write` made, or any MiniMax-M3")
    running.add_argument("out", type=Path, help="the result, JSON; logs go beside it")
    running.add_argument("--only", type=names(PARTS), default=("cells",), help=f"of {', '.join(PARTS)}")
    running.add_argument("--engine", choices=ENGINES, default="vllm", help="that measures both classes")
    of = f"of {', '.join(children.NAMES)}; the first is compared with the others; equal adds eager"
    running.add_argument("--classes", type=names(children.NAMES), default=("ours", "in-tree"), help=of)
    running.add_argument("--rounds", type=int, default=1, help="runs of each class, in turn")
    running.add_argument("--max-model-len", type=int, default=524_288, help="of both")
    running.add_argument("--options", type=json.loads, default={}, help="more arguments of the engine, JSON")
    running.add_argument("--ours-options", type=json.loads, default={}, help="the same for our class alone")
    also = 'one of these once more, with other options: NAME=CLASS{"option": ...}; may be given several times'
    running.add_argument("--also", type=another, action="append", default=[], help=also)

    group, default = running.add_argument_group("cells"), cells.Plan((), (), ())
    group.add_argument("--cells", type=names(cells.KINDS), default=cells.KINDS, help=f"of {', '.join(cells.KINDS)}")
    group.add_argument("--contexts", type=numbers, default=(4_096, 32_768, 131_072, 500_000), help="in tokens")
    group.add_argument("--suffixes", type=numbers, default=(64, 171, 512, 2_048), help="new tokens after a prefix hit")
    group.add_argument("--batches", type=numbers, default=(1, 8, 32, 64), help="requests that decode at once")
    group.add_argument("--repeats", type=int, default=default.repeats, help="samples a cell")
    group.add_argument("--window-ms", type=float, default=default.window_ms, help="of one sample of decode")
    group.add_argument("--gpu-steps", type=int, default=default.gpu_steps, help="decode steps that are profiled")
    group.add_argument("--cold-tokens", type=int, default=default.cold_tokens, help="of a length's cold prompts")
    group.add_argument("--prefix-tokens", type=int, default=default.prefix_tokens, help="that rows of a batch share")
    group.add_argument("--row-tokens", type=int, default=default.row_tokens, help="of a batch's prompts, at most")
    group.add_argument("--seconds", type=float, help="begin no cell of a class later than this")

    group = running.add_argument_group("profile")
    group.add_argument("--profile-contexts", type=numbers, default=(4_096, 131_072), help="in tokens")
    group.add_argument("--profile-batches", type=numbers, default=(1, 32), help="requests that decode at once")
    group.add_argument("--profile-new", type=numbers, default=(171, 8_192), help="new tokens of a step after a hit")
    group.add_argument("--profile-steps", type=int, default=20, help="of decode")

    group = running.add_argument_group("equal")
    group.add_argument("--lengths", type=numbers, default=(4_000, 32_000, 128_000), help="of prompts, in tokens")

    group, shape = running.add_argument_group("serve"), conversations.Shape()
    group.add_argument("--concurrency", type=numbers, default=(8,), help="requests at once; a replay each")
    group.add_argument("--conversations", type=int, default=shape.conversations, help="twice --concurrency or more")
    group.add_argument("--turns", type=int, default=shape.turns, help="of each")
    group.add_argument("--shared", type=int, default=shape.shared, help="tokens of the system prompt")
    group.add_argument("--first", type=int, default=shape.first, help="tokens of the first prompt after it")


def another(text: str) -> tuple[str, str, dict[str, Any]]:
    """Its name, the class that it is once more, and in which options it is another."""
    name, _, rest = text.partition("=")
    of, brace, options = rest.partition("{")
    if of not in children.NAMES:
        raise argparse.ArgumentTypeError(f"{of!r} is not one of {', '.join(children.NAMES)}")
    return name, of, json.loads(brace + options)


def names(allowed: Collection[str]) -> Any:
    def listed(text: str) -> tuple[str, ...]:
        found = tuple(text.split(","))
        for name in found:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(allowed)}")
        return found

    return listed


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure each class in turn; what there is so far is written after every one."""
    found: dict[str, Any] = {
        "what": record.WHAT,
        "engine": arguments.engine,
        "command": " ".join(["benchmarks/engine", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **machine.facts(),
        "runs": [],
    }
    folder = arguments.out.with_suffix(".logs")
    folder.mkdir(parents=True, exist_ok=True)
    for number, name, one_of, plans in jobs(arguments):
        print(f"{name}, round {number + 1}: {', '.join(plans)}", flush=True)
        options = options_of(one_of, arguments)
        measure = served if "serve" in plans else children.run
        started = time.monotonic()
        one = measure(arguments.engine, name, one_of, arguments.model, options, plans, folder, show)
        took = round(time.monotonic() - started, 1)
        found["runs"].append({"class": name, "round": number, "seconds": took, "options": options} | one)
        arguments.out.write_text(json.dumps(found) + "\n")
    return record.finished(found)


def options_of(one: children.Class, arguments: argparse.Namespace) -> dict[str, Any]:
    """Of the engine, for a class."""
    engine = ENGINES[arguments.engine]
    options = engine.options | {engine.longest: arguments.max_model_len} | arguments.options
    if one.is_ours:
        options |= arguments.ours_options
    return options | one.options


def show(line: str) -> None:
    print(f"  {line}", flush=True)


def jobs(arguments: argparse.Namespace) -> Iterator[tuple[int, str, children.Class, dict[str, Any]]]:
    """Round, name, class and the plan of each part, in order; one engine serves all parts but `serve`."""
    plans: dict[str, Any] = {
        "cells": cells.Plan(
            contexts=arguments.contexts, suffixes=arguments.suffixes, batches=arguments.batches, kinds=arguments.cells,
            repeats=arguments.repeats, window_ms=arguments.window_ms, gpu_steps=arguments.gpu_steps,
            cold_tokens=arguments.cold_tokens, prefix_tokens=arguments.prefix_tokens, row_tokens=arguments.row_tokens,
            seconds=arguments.seconds,
        ),
        "profile": profile.Plan(
            contexts=arguments.profile_contexts, batches=arguments.profile_batches, new=arguments.profile_new,
            steps=arguments.profile_steps,
        ),
        "equal": equal.Plan(lengths=arguments.lengths),
    }  # fmt: skip
    plans = {part: plan for part, plan in plans.items() if part in arguments.only}
    shape = conversations.Shape(arguments.conversations, arguments.turns, arguments.shared, arguments.first)
    known = children.classes(ENGINES[arguments.engine])
    classes = {name: known[name] for name in arguments.classes}
    for name, of, options in arguments.also:
        classes[name] = children.Class(known[of].environment, known[of].options | options)
    for number in range(arguments.rounds):
        if number:
            plans.pop("equal", None)  # a second round would say the same
        for name, one in classes.items():
            if plans:
                yield number, name, one, plans
        if "equal" in plans and "eager" not in classes:
            yield number, "eager", known["eager"], {"equal": plans["equal"]}
        if "serve" in arguments.only:
            for name, one in classes.items():
                yield number, name, one, {"serve": serve.Plan(arguments.concurrency, shape)}


def served(
    engine: str,
    name: str,
    one: children.Class,
    model: str,
    options: dict[str, Any],
    plans: dict[str, Any],
    folder: Path,
    show: Any,
) -> dict[str, Any]:
    """What `children.run` is for the other parts."""
    found: dict[str, Any] = {"parts": {"serve": []}}
    try:
        for row in serve.measure(model, options, plans["serve"], children.environment(ENGINES[engine], one), folder):
            found["parts"]["serve"].append(row)
            show(children.brief(row))
    except (RuntimeError, OSError) as error:
        log = folder / f"{name}-serve.log"
        log.write_text(str(error))
        found["failed"] = f"{str(error)[-4000:].rstrip()}\nAll that was said is in {log}."
    return found
