"""``msa-backend inspect``. Nothing that needs torch is imported before it runs, so that ``--help`` works without."""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msa_backend.config import MSAError
from msa_backend.model.config import M3Config, text_section
from msa_backend.size.memory import read_config
from msa_backend.sizes import size, sizes

from .errors import InspectError

if TYPE_CHECKING:
    from .plan import Plan


def add_parser(subparsers: Any) -> None:
    """Add the subcommand ``inspect`` to the action that ``ArgumentParser.add_subparsers`` returned."""
    parser = subparsers.add_parser(
        "inspect",
        help="show which blocks a checkpoint selects, and how much attention they hold",
        description="Read a prompt with transformers' MiniMax-M3 and show which blocks each layer, KV group and query "
        "selects, how much of dense attention lies in them, and how much other selectors would capture on the same "
        "queries and keys. The exit status is 2 if nothing can be said.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of a MiniMax-M3 checkpoint")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--prompt", metavar="TEXT", help="what to read (default: a fact in a long text, as probe asks)")
    text.add_argument("--file", type=Path, metavar="FILE", help="a text file to read")
    parser.add_argument(
        "--length", type=size, metavar="N", help="first N tokens of the text (default: all; of the long text 8K)"
    )
    parser.add_argument("--target", metavar="TEXT", help="part of the prompt to look for (default: the fact)")
    parser.add_argument(
        "--depth", type=float, default=50.0, metavar="P", help="of the fact in the long text, in %% (default: 50)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another fact and text (default: 0)")
    parser.add_argument("--layers", type=_numbers, metavar="N,...", help="sparse ones (default: all of them)")
    parser.add_argument(
        "--queries",
        type=size,
        default=256,
        metavar="N",
        help="tokens whose dense attention is computed, spread over the prompt (default: %(default)s); maps show all",
    )
    parser.add_argument(
        "--topk", type=_numbers, metavar="N,...", help="of the sweep (default: half, all and twice the model's)"
    )
    parser.add_argument(
        "--block-sizes", type=sizes, metavar="N,...", help="of the sweep (default: half, all and twice the model's)"
    )
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="default: the weights'"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if available")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the maps to FILE (needs matplotlib)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """0, or 2 with a sentence on stderr if nothing can be said."""
    try:
        _check(options)
        found = _measure(options)
    except MSAError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        return _refuse("interrupted")
    from . import report

    print("\n".join(report.lines(found)))
    if options.json:
        options.json.write_text(json.dumps(found))
    if options.plot:
        report.plot(found, options.plot, f"{options.model.name}, {found['tokens']:,} tokens: selected blocks")
    return 0


def _check(options: argparse.Namespace) -> None:
    for package in ("torch", "transformers"):
        if find_spec(package) is None:
            raise InspectError(f"{package} is not installed; pip install {package}")
    if options.plot and find_spec("matplotlib") is None:
        raise InspectError("--plot needs matplotlib, which is not installed; pip install matplotlib")
    for path in filter(None, (options.json, options.plot)):
        if not path.parent.is_dir():
            raise InspectError(f"{path} cannot be written, there is no directory {path.parent}; make it first")
    if not 0 <= options.depth <= 100:
        raise InspectError(f"--depth is {options.depth:g}, but is a percentage from 0 to 100")
    if not options.model.is_dir():
        raise InspectError(f"there is no folder {options.model}; pass the folder of a MiniMax-M3 checkpoint")


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    config = _config(options.model)
    import torch

    from . import forward, report
    from .measure import Measures
    from .prompt import load_tokenizer

    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InspectError("torch sees no GPU; leave --device out or install a CUDA build of torch")
    ids, plan = _plan(options, config, load_tokenizer(options.model))
    decoder = forward.load(options.model, options.dtype, device)
    measures = Measures(plan, config.msa.num_kv_heads)
    started = time.monotonic()
    # On a terminal one line that changes, in a log a line each.
    begin, end = ("\r", "") if sys.stderr.isatty() else ("", "\n")
    for done in forward.read(decoder, ids, measures.observe):
        line = f"{done:,} of {len(ids):,} tokens, {time.monotonic() - started:.0f} s"
        print(begin + line, end=end, file=sys.stderr)
    if not end:
        print(file=sys.stderr)
    return {"model": options.model.name} | report.result(measures)


def _config(model: Path) -> M3Config:
    raw = read_config(model)
    kind = str(raw.get("model_type"))
    if not kind.startswith("minimax_m3"):
        raise InspectError(f"{model} is a model of type {kind}, not MiniMax-M3; pass the folder of a MiniMax-M3")
    if "text_config" not in raw:
        # transformers would take its defaults for what is missing: a model of the released size.
        raise InspectError(f"{model} holds the text model alone, which transformers does not load; pass a whole one")
    config = M3Config.from_text_config(text_section(raw))
    if config.msa.init_blocks:
        raise InspectError(
            f"sparse_init_block is {config.msa.init_blocks}, but transformers forces no first blocks in, so its "
            "selection would not be the model's"
        )
    return config


def _plan(options: argparse.Namespace, config: M3Config, tokenizer: Any) -> tuple[list[int], Plan]:
    from .plan import Plan, sample, selection_of, sweep

    msa = config.msa
    prompt = _prompt(options, tokenizer)
    if len(prompt.ids) > config.max_position_embeddings:
        raise InspectError(
            f"the prompt has {len(prompt.ids):,} tokens, but the config allows {config.max_position_embeddings:,} "
            "positions; cut it with --length"
        )
    sparse = [number for number, flag in enumerate(msa.sparse_layers) if flag]
    layers = sorted({*(options.layers or sparse)})
    if unknown := [layer for layer in layers if layer not in sparse]:
        raise InspectError(f"layer {unknown[0]} is not sparse; choose --layers from {sparse[0]} to {sparse[-1]}")
    selection = selection_of(msa)
    plan = Plan(
        num_tokens=len(prompt.ids),
        layers=tuple(layers),
        block_size=msa.block_size,
        selection=selection,
        target=prompt.target,
        queries=sample(len(prompt.ids), msa.block_size, selection, options.queries),
        sweep=sweep(msa, options.block_sizes, options.topk),
    )
    return prompt.ids, plan


def _prompt(options: argparse.Namespace, tokenizer: Any) -> Any:
    from .prompt import of_needle, of_text

    if options.prompt is None and options.file is None and options.target is None:
        return of_needle(tokenizer, options.length, options.depth / 100, options.seed)
    if options.prompt is None and options.file is None:
        raise InspectError("--target is a part of a text of yours; pass that with --prompt or --file")
    try:
        text = options.prompt if options.file is None else options.file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InspectError(f"{options.file} cannot be read as text ({error}); pass another --file") from None
    return of_text(tokenizer, text, options.target, options.length)


def _refuse(sentence: str) -> int:
    print(f"msa-backend inspect: {sentence}", file=sys.stderr)
    return 2


def _numbers(text: str) -> list[int]:
    found = [int(part) for part in text.split(",")]
    if any(number < 0 for number in found):
        raise argparse.ArgumentTypeError("numbers start at 0")
    return found
