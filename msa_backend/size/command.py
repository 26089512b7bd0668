"""The command. Needs a ``config.json`` at most: no engine, no torch and no GPU."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from msa_backend.config import MSAError
from msa_backend.model.config import M3Config, text_section
from msa_backend.refusals import check_even_heads
from msa_backend.sizes import size, sizes

from . import claims, compute, memory, predict, released
from .memory import Wish

LENGTHS = "8K,32K,128K,512K,1M"


def add_parser(subparsers: Any) -> None:
    """Add the subcommand ``size`` to the action that ``ArgumentParser.add_subparsers`` returned."""
    parser = subparsers.add_parser(
        "size",
        help="compute what a model takes on given GPUs, and what MSA saves at a length",
        description="Compute weights and caches on each rank, how much less a token takes than with dense attention, "
        "and, from measured layer times, a prediction of the whole model. Nothing is run. The exit status is 2 if "
        "nothing can be said.",
    )
    parser.add_argument(
        "model", type=Path, nargs="?", metavar="MODEL", help="folder with a config.json (default: as released, bf16)"
    )
    parser.add_argument("--tensor-parallel-size", type=size, default=1, metavar="N", help="ranks (default: 1)")
    parser.add_argument("--kv-cache-dtype", choices=("bf16", "fp8"), default="bf16", help="default: %(default)s")
    parser.add_argument("--indexer-kv-dtype", choices=("bf16", "fp8"), default="bf16", help="default: %(default)s")
    parser.add_argument("--max-model-len", type=size, metavar="N", help="in tokens (default: what the config allows)")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="of one GPU, as nvidia-smi reports it")
    parser.add_argument(
        "--lengths", type=sizes, default=LENGTHS, metavar="N,...", help="to compute and predict (default: %(default)s)"
    )
    parser.add_argument(
        "--measured", type=Path, metavar="FILE", help="predict from what msa-backend bench --json FILE wrote on a GPU"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """0, or 2 with a sentence on stderr if nothing can be said."""
    try:
        print("\n".join(_lines(options)))
    except MSAError as error:
        print(f"msa-backend size: {error}", file=sys.stderr)
        return 2
    return 0


def _lines(options: argparse.Namespace) -> list[str]:
    wish = _wish(options)
    found, warnings = memory.examine(wish)
    lines = ["Memory, computed", *(f"  {line}" for line in found), *(f"  warning: {line}" for line in warnings)]
    lines += ["", "Arithmetic of one token that sees so many, in GFLOP; how many times less than with dense attention"]
    lines += compute.table(wish.config, sorted(options.lengths))
    if options.measured is not None:
        lines += ["", *_prediction(options, wish)]
    for said in (claims.REPORT, claims.ANNOUNCEMENT):
        lines += ["", f"Claimed by the vendor, not measured here: {said.source}, against {said.against}"]
        lines += [f"  {sentence}" for sentence in said.sentences]
    return lines


def _wish(options: argparse.Namespace) -> Wish:
    raw = released.TEXT_CONFIG if options.model is None else memory.read_config(options.model)
    config = M3Config.from_text_config(text_section(raw))
    check_even_heads("--tensor-parallel-size", options.tensor_parallel_size, config.msa)
    return Wish(
        config=config,
        form=memory.form_of(raw),
        ranks=options.tensor_parallel_size,
        kv_item=1 if options.kv_cache_dtype == "fp8" else 2,
        index_item=1 if options.indexer_kv_dtype == "fp8" else 2,
        max_model_len=options.max_model_len,
        memory=options.gpu_memory * memory.GIB if options.gpu_memory else None,
    )


def _prediction(options: argparse.Namespace, wish: Wish) -> Iterator[str]:
    measured = predict.Measured(options.measured, wish.config, wish.ranks)
    yield (
        f"Prediction, not a measurement: {wish.config.num_layers} layers on {wish.ranks} x {measured.device}, from "
        f"layers measured in bf16 with {'/'.join(map(str, measured.heads))} heads;"
    )
    yield "a floor: communication, routing, norms and the server are left out"
    for tokens in sorted(options.lengths):
        try:
            times = predict.first_token(wish.config, wish.ranks, measured, tokens)
        except MSAError as error:
            yield f"  no first token of {tokens:,} tokens or more: {error}"
            break
        yield f"  first token of {tokens:>9,}: " + _beside(times, "s")
    for batch in measured.batches():
        for context, times in predict.decode_steps(wish.config, wish.ranks, measured, batch, wish.form):
            yield f"  a token, {batch:>3} at {context:>9,}: " + _beside(times, "ms")


def _beside(times: dict[str, float], unit: str) -> str:
    ours = f"ours {times[predict.OURS]:.3g} {unit}"
    if predict.IN_TREE not in times:
        return ours
    in_tree = times[predict.IN_TREE]
    return f"{ours}, in-tree {in_tree:.3g} {unit} ({in_tree / times[predict.OURS]:.2f}x)"
