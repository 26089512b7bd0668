"""Our model class and the engine's own in the same engine on the same files: how long does a user wait?

    python benchmarks/engine write MODEL                          # 20 layers, released attention, random weights
    python benchmarks/engine run MODEL out.json                   # both classes, one table
    python benchmarks/engine run MODEL out.json --only profile    # kernels and GPU time of a step
    python benchmarks/engine run MODEL out.json --only equal      # do they say the same? with graphs and without
    python benchmarks/engine run MODEL out.json --only serve --options '{"kv_cache_memory_bytes": 20000000000}'
                                                                  # `vllm bench serve`, on conversations
    python benchmarks/engine truth MODEL truth.json               # on any CPU: what transformers computes in fp32
    python benchmarks/engine run MODEL out.json --only truth --truth truth.json
    python benchmarks/engine run MODEL out.json --engine sglang   # any of them in SGLang, but for serve
    python benchmarks/engine table out.json more.json             # several results as one

Each class runs in a process of its own, one after the other, with the engine's defaults but for --max-model-len and
what --options says; the settings that it resolved are in the JSON. For `serve` the servers of all classes run side by
side and are asked one after the other, so that a replay of one stands beside the same replay of the other: their caches
must fit on the GPU together. In this repository's folder set PYTHONSAFEPATH=1.
A class with other options than the rest is one more class. How far fp8 caches move log-probabilities, for example,
beside how far the two classes are apart without them:

    python benchmarks/engine run MODEL out.json --only equal
        --options '{"kv_cache_dtype": "fp8", "attention_config": {"indexer_kv_dtype": "fp8"}}'
        --also 'bf16=ours{"kv_cache_dtype": "auto", "attention_config": {}}'
        --also 'in-tree bf16=in-tree{"kv_cache_dtype": "auto", "attention_config": {}}'

"model" among its options takes other files, and "environment" has variables of its process.

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
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from engine import cells, checkpoint, children, conversations, equal, machine, profile, record, serve, truth
from engine.engines import ENGINES

PARTS = (*children.PARTS, "serve")


def main() -> int:
    arguments = parse(sys.argv[1:])
    if arguments.step == "write":
        checkpoint.write(arguments.model, arguments.layers, arguments.quantization)
        if arguments.cache_scales:
            checkpoint.add_cache_scales(arguments.model, arguments.layers)
        if arguments.draft:
            checkpoint.write_draft(arguments.draft, arguments.model)
        return 0
    if arguments.step == "truth":
        truth.write(arguments.model, arguments.file, arguments.lengths)
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
    steps = parser.add_subparsers(dest="step", required=True, metavar="{write,truth,run,table}")
    writing = steps.add_parser("write", help="write the model")
    writing.add_argument("model", type=Path)
    writing.add_argument("--layers", type=int, default=checkpoint.LAYERS, help="the first is dense; %(default)s")
    writing.add_argument("--quantization", help="mxfp8 or fp8, as `msa-backend tiny` writes them")
    writing.add_argument("--cache-scales", action="store_true", help="with scales of an fp8 cache in every layer")
    writing.add_argument("--draft", type=Path, help="write an EAGLE3 draft for the model there")
    exact = steps.add_parser("truth", help="write what transformers computes in fp32")
    exact.add_argument("model", type=Path)
    exact.add_argument("file", type=Path)
    exact.add_argument("--lengths", type=numbers, default=truth.LENGTHS, help="of prompts, in tokens")
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
    if arguments.step == "run" and "truth" in arguments.only and arguments.truth is None:
        parser.error("--only truth needs --truth FILE; write it with `benchmarks/engine truth MODEL FILE`")
    if arguments.step == "run" and arguments.at_once > 1 and not {"equal", "truth"}.issuperset(arguments.only):
        parser.error(
            f"--at-once {arguments.at_once} with --only {','.join(arguments.only)} would spoil what is timed; "
            "leave it at 1 or ask for --only equal or truth"
        )
    return arguments


def add_run(running: argparse.ArgumentParser) -> None:
    running.add_argument("model", help="a folder that `write` made, or any MiniMax-M3")
    running.add_argument("out", type=Path, help="the result, JSON; logs go beside it")
    running.add_argument("--only", type=names(PARTS), default=("cells",), help=f"of {', '.join(PARTS)}")
    running.add_argument("--engine", choices=ENGINES, default="vllm", help="that measures both classes")
    of = f"of {', '.join(children.NAMES)}; the first is compared with the others; equal adds eager"
    running.add_argument("--classes", type=names(children.NAMES), default=("ours", "in-tree"), help=of)
    running.add_argument("--rounds", type=int, default=1, help="runs of each class, in turn")
    at_once = (
        "engines that run side by side, where nothing is timed (--only equal or truth); they share the GPU's memory"
    )
    running.add_argument("--at-once", type=int, default=1, help=at_once)
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

    group = running.add_argument_group("truth")
    group.add_argument("--truth", type=Path, help="the file that `truth` wrote")

    group, shape = running.add_argument_group("serve"), conversations.Shape()
    group.add_argument("--concurrency", type=numbers, default=(8,), help="requests at once; a replay each")
    group.add_argument("--conversations", type=int, default=shape.conversations, help="twice --concurrency or more")
    group.add_argument("--turns", type=int, default=shape.turns, help="of each")
    group.add_argument("--shared", type=int, default=shape.shared, help="tokens of the system prompt")
    group.add_argument("--first", type=int, default=shape.first, help="tokens of the first prompt after it")
    group.add_argument("--random", type=numbers, default=(), help="lengths of random prompts, in tokens; a replay each")


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

    def measure(job: tuple[int, str, children.Class, dict[str, Any]]) -> dict[str, Any]:
        number, name, one_of, plans = job
        print(f"{name}, round {number + 1}: {', '.join(plans)}", flush=True)
        options = options_of(one_of, arguments)
        started = time.monotonic()
        one = children.run(arguments.engine, name, one_of, options, plans, folder, partial(show, name))
        took = round(time.monotonic() - started, 1)
        return {"class": name, "round": number, "seconds": took, "options": options} | one

    with ThreadPoolExecutor(arguments.at_once) as pool:
        for one in pool.map(measure, jobs(arguments)):
            found["runs"].append(one)
            arguments.out.write_text(json.dumps(found) + "\n")
    if "serve" in arguments.only:
        for served in serve_all(arguments, folder):
            arguments.out.write_text(json.dumps(found | {"runs": found["runs"] + served}) + "\n")
        found["runs"] += served
    return record.finished(found)


def options_of(one: children.Class, arguments: argparse.Namespace) -> dict[str, Any]:
    """Of the engine, for a class."""
    engine = ENGINES[arguments.engine]
    options = {engine.model: arguments.model, engine.longest: arguments.max_model_len} | engine.options
    options |= arguments.options
    if one.is_ours:
        options |= arguments.ours_options
    return options | one.options


def show(name: str, line: str) -> None:
    print(f"  {name}: {line}", flush=True)


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
        "truth": truth.Plan(str(arguments.truth)),
    }  # fmt: skip
    plans = {part: plan for part, plan in plans.items() if part in arguments.only}
    classes = classes_of(arguments)
    for number in range(arguments.rounds):
        if number:
            for once in ("equal", "truth"):  # a second round would say the same
                plans.pop(once, None)
        for name, one in classes.items():
            if plans:
                yield number, name, one, plans
        if "equal" in plans and "eager" not in classes:
            yield number, "eager", children.classes(ENGINES[arguments.engine])["eager"], {"equal": plans["equal"]}


def classes_of(arguments: argparse.Namespace) -> dict[str, children.Class]:
    known = children.classes(ENGINES[arguments.engine])
    found = {name: known[name] for name in arguments.classes}
    for name, of, options in arguments.also:
        of_its_own = {key: value for key, value in options.items() if key != "environment"}
        environment = known[of].environment | options.get("environment", {})
        found[name] = children.Class(environment, known[of].options | of_its_own)
    return found


def serve_all(arguments: argparse.Namespace, folder: Path) -> Iterator[list[dict[str, Any]]]:
    """The runs so far, one a class and round, whenever there is news."""
    shape = conversations.Shape(arguments.conversations, arguments.turns, arguments.shared, arguments.first)
    plan = serve.Plan(arguments.concurrency, shape, arguments.random)
    starts = {
        name: serve.Start(options_of(one, arguments), children.environment(ENGINES[arguments.engine], one))
        for name, one in classes_of(arguments).items()
    }
    runs: dict[tuple[str, int], dict[str, Any]] = {}
    started = time.monotonic()
    yield []
    for name, number, news in serve.measure(starts, plan, arguments.rounds, folder):
        empty = {"class": name, "round": number, "options": starts[name].options, "parts": {"serve": []}}
        run = runs.setdefault((name, number), empty)
        run["seconds"] = round(time.monotonic() - started, 1)
        if isinstance(news, str):
            log = serve.file_of(folder, f"{name}-serve.log")
            log.write_text(news)
            run["failed"] = f"{news[-4000:].rstrip()}\nAll that was said is in {log}."
            show(name, f"failed, see {log}")
        else:
            run["parts"]["serve"].append(news)
            show(name, children.brief(news))
        yield sorted(runs.values(), key=lambda run: (run["round"], list(starts).index(run["class"])))
