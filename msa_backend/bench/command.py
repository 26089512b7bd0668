"""``msa-backend bench``. Nothing that needs torch is imported before it runs, so that ``--help`` works without."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import shlex
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msa_backend.bench import baselines, serve
from msa_backend.bench.cases import (
    BOUNDS,
    CALIBRATED,
    MODES,
    NEW_TOKENS,
    PRESETS,
    RANDOM,
    Case,
    capture_for,
    grid,
)
from msa_backend.sizes import size, sizes

if TYPE_CHECKING:
    import torch


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="benchmark MSA's kernels against the engines' own and dense attention",
        description="Benchmark one sparse layer's attention: MSA against the kernels in vLLM and SGLang and dense "
        "FlashAttention, whichever are installed, on the same inputs. Each implementation is checked against fp64 "
        "first, and a wrong one is not timed; the exit status is 1 if ours is wrong.",
    )
    parser.add_argument(
        "--host",
        action="store_true",
        help="measure host time instead: one layer's operations called eagerly, ours and vLLM's, with and without "
        "norm, rope and cache write",
    )
    parser.add_argument(
        "--preset", choices=PRESETS, help="list of cases (default: release on a GPU, host with --host, small on a CPU)"
    )
    parser.add_argument("--modes", type=_modes, metavar="MODE,...", help=f"any of {', '.join(MODES)} (default: all)")
    parser.add_argument(
        "--contexts", type=sizes, metavar="N,...", help="in tokens, e.g. 8K,128K,1M; replaces the preset"
    )
    parser.add_argument("--batches", type=sizes, default=[1], metavar="N,...", help="numbers of sequences (default: 1)")
    parser.add_argument(
        "--new-tokens",
        type=size,
        metavar="N",
        help=f"per sequence (default: {', '.join(f'{m} {NEW_TOKENS[m]}' for m in MODES)})",
    )
    parser.add_argument(
        "--heads", type=_heads, default=[(64, 4)], metavar="Q/KV,...", help="e.g. 64/4,16/1 (default: 64/4)"
    )
    parser.add_argument(
        "--head-dim", type=int, default=128, metavar="N", help="of attention and index (default: %(default)s)"
    )
    parser.add_argument(
        "--topk", type=int, default=16, metavar="N", help="blocks selected per token (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="default: %(default)s")
    parser.add_argument("--fp8-index", action="store_true", help="store index keys and index queries in e4m3")
    parser.add_argument("--fp8-kv", action="store_true", help="store keys and values in e4m3")
    parser.add_argument(
        "--locality",
        type=_locality,
        metavar="calibrated|random|COSINE",
        help="how far neighbouring tokens agree: calibrated, four select 22 distinct blocks of 64 as in the real model "
        "(default); random, the worst case; or the cosine between their index queries",
    )
    parser.add_argument(
        "--capture-for",
        type=_bounds,
        metavar="own|N,...",
        help="capture CUDA graphs of decode and verify for this many tokens, as a server does for its max_model_len; "
        "own: for the longest sequence of the case (default: 1M,128K; own on a CPU)",
    )
    parser.add_argument(
        "--run", type=_names, dest="implementations", metavar="NAME,...", help=f"any of {', '.join(baselines.NAMES)}"
    )
    parser.add_argument("--kernels", action="store_true", help="also print the time of each GPU kernel")
    parser.add_argument(
        "--budget", type=float, default=0.1, metavar="SECONDS", help="of device time per median (default: %(default)s)"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if available")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results to FILE")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="plot time against context to FILE (needs matplotlib)"
    )
    parser.add_argument("--read", type=Path, metavar="FILE", help="plot the results in FILE instead of measuring")
    parser.set_defaults(run=run)
    serve.add_parser(parser.add_subparsers(title="instead of kernels", metavar="serve"))


def run(options: argparse.Namespace) -> int:
    if find_spec("torch") is None:
        return _refuse("torch is not installed; install an engine, which brings the torch it was built for")
    if options.host and options.plot:
        return _refuse("--host has nothing to plot; leave --plot out")
    if options.host and options.capture_for:
        return _refuse("--host calls eagerly and captures nothing; leave --capture-for out")
    if options.host and (others := sorted({*(options.implementations or ())} - {*baselines.WITH_LAYER})):
        known = " and ".join(baselines.WITH_LAYER)
        return _refuse(f"--host measures {known}; leave {', '.join(others)} out of --run")
    if options.plot and find_spec("matplotlib") is None:
        return _refuse("--plot needs matplotlib, which is not installed; pip install matplotlib")
    for path in filter(None, (options.json, options.plot)):
        if not path.parent.is_dir():
            return _refuse(f"{path} cannot be written, there is no directory {path.parent}; make it first")
    if options.read:
        return _replot(options)
    import torch

    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        return _refuse("torch sees no GPU; leave --device out or install a CUDA build of torch")
    cases = _cases(options, device)
    if not cases:
        return _refuse("the preset has no such case; name --contexts to make your own")
    return _measure(cases, device, options)


def _replot(options: argparse.Namespace) -> int:
    from msa_backend.bench import plot, report

    if not options.plot:
        return _refuse("--read measures nothing; say with --plot where to draw what was measured")
    try:
        written = json.loads(options.read.read_text())
        found = report.read(written)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return _refuse(f"{options.read} is not what --json writes ({error}); measure anew")
    plot.write(found, options.plot, f"MSA, one layer, {written['device']}, {written['date']}")
    return 0


def _cases(options: argparse.Namespace, device: torch.device) -> list[Case]:
    if device.type == "cpu":
        preset, bounds = "small", [0]
    elif options.host:
        preset, bounds = "host", [0]
    else:
        preset, bounds = "release", [*BOUNDS]
    return list(capture_for(_uncaptured(options, preset), options.capture_for or bounds))


def _uncaptured(options: argparse.Namespace, preset: str) -> list[Case]:
    """Of --contexts if given, else of the preset; --modes and --locality apply to either."""
    if options.contexts:
        base = Case(
            "prefill",
            1,
            dim=options.head_dim,
            topk=options.topk,
            dtype=options.dtype,
            fp8_index=options.fp8_index,
            fp8_kv=options.fp8_kv,
            locality=CALIBRATED if options.locality is None else options.locality,
        )
        modes = options.modes or ["prefill"]
        return list(grid(modes, options.contexts, options.batches, options.heads, options.new_tokens, base))
    cases = [case for case in PRESETS[options.preset or preset]() if case.mode in (options.modes or MODES)]
    return cases if options.locality is None else [replace(case, locality=options.locality) for case in cases]


def _measure(cases: list[Case], device: torch.device, options: argparse.Namespace) -> int:
    import torch

    from msa_backend.bench import ceilings, plot, report, runner, timing

    about = _about(device)
    print("; ".join(f"{key} {value}" for key, value in about.items() if key != "command"))
    names, absent = _available(options, device)
    if options.host:
        return _measure_host(cases, names, device, options, {**about, "absent": absent})

    clock: timing.Clock
    if device.type == "cpu":
        clock = timing.CpuClock(options.budget)
    else:
        clock = timing.CudaClock(options.budget, torch.cuda.get_device_properties(device).L2_cache_size)
    rates = ceilings.measure(device, cases[0].dtype, clock)
    print(
        f"ceilings here: read {report.per_second(rates.bandwidth, 'B')}, copy {report.per_second(rates.copy, 'B')}, "
        f"{cases[0].dtype} product {report.per_second(rates.flops, 'FLOP')}, "
        f"fp8 product {report.per_second(rates.fp8_flops, 'FLOP')}\n"
    )

    setup = runner.Setup(device, clock, names, options.kernels)
    found = []
    for case in cases:
        found.append(runner.run(case, setup))
        print("\n".join(report.block(found[-1], rates)), flush=True)
        # Kept as it grows: hours of a large grid are not lost to its last case.
        if options.json:
            written = report.record(found, rates, about, absent)
            options.json.write_text(json.dumps(written, indent=1) + "\n")
    print()
    print("\n".join((*report.summary(found, rates), "", report.LEGEND)))
    if options.plot:
        plot.write(found, options.plot, f"MSA, one layer, {about['device']}, {about['date']}")
    return int(any(result.wrong and result.name == report.OURS for case in found for result in case.results))


def _available(options: argparse.Namespace, device: torch.device) -> tuple[list[str], dict[str, str]]:
    """The implementations that can run here, and the reason for each other; prints the reasons."""
    names, absent = [], {}
    for name in options.implementations or (baselines.WITH_LAYER if options.host else baselines.DEFAULT):
        reason = baselines.load(name).unavailable(device)
        if reason is None:
            names.append(name)
        else:
            absent[name] = " ".join(reason.split())
            print(f"without {name}: {absent[name]}")
    return names, absent


def _measure_host(
    cases: list[Case], names: list[str], device: torch.device, options: argparse.Namespace, about: dict[str, Any]
) -> int:
    from msa_backend.bench import host

    found = [host.run(case, names, device, options.budget) for case in cases]
    if device.type == "cpu":
        print("on a CPU the operations themselves are in these times")
    print("\n" + "\n".join(host.table(found)))
    if options.json:
        options.json.write_text(json.dumps({**about, "cases": host.record(found)}, indent=1) + "\n")
    return int(any(result.trouble and result.name == "ours" for case in found for result in case.results))


def _about(device: torch.device) -> dict[str, Any]:
    import torch

    from msa_backend import __version__

    about: dict[str, Any] = {"msa-backend": __version__, "date": datetime.date.today().isoformat()}
    about["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    if device.type == "cuda":
        about["driver"] = _driver()
    about["torch"] = torch.__version__
    for name in ("triton", "vllm", "sglang", "flashinfer-python"):
        try:
            about[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**about, "command": shlex.join(["msa-backend", *sys.argv[1:]])}


def _driver() -> str:
    """Of the NVIDIA kernel module, from its own file; torch does not say."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split("\n")[0].split()
    except OSError:
        return "unknown"
    return next((word for word in words if word.count(".") == 2 and word[0].isdigit()), "unknown")


def _refuse(reason: str) -> int:
    print(f"msa-backend bench: {reason}", file=sys.stderr)
    return 1


def _locality(text: str) -> float | str:
    if text == CALIBRATED:
        return CALIBRATED
    try:
        cosine = 0.0 if text == RANDOM else float(text)
    except ValueError:
        cosine = -1.0
    if not 0 <= cosine < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no locality; write calibrated, random, or a cosine from 0 to under 1, such as 0.99"
        )
    return cosine


def _bounds(text: str) -> list[int]:
    return [0 if part == "own" else size(part) for part in text.split(",")]


def _heads(text: str) -> list[tuple[int, int]]:
    heads = []
    for part in text.split(","):
        queries, _, kv = part.partition("/")
        if not (queries.isdigit() and kv.isdigit() and int(kv) and int(queries) and int(queries) % int(kv) == 0):
            raise argparse.ArgumentTypeError(f"{part!r} is no query heads / KV heads; write such as 64/4")
        heads.append((int(queries), int(kv)))
    return heads


def _modes(text: str) -> list[str]:
    return _of(text, MODES)


def _names(text: str) -> list[str]:
    return _of(text, baselines.NAMES)


def _of(text: str, allowed: tuple[str, ...]) -> list[str]:
    for part in text.split(","):
        if part not in allowed:
            raise argparse.ArgumentTypeError(f"{part!r} is none of {', '.join(allowed)}")
    return text.split(",")
