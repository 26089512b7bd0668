"""``msa-backend tiny DIR``."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from msa_backend.tiny.checkpoint import DTYPES, FORMS, write_tiny_checkpoint
from msa_backend.tiny.errors import TinyCheckpointError
from msa_backend.tiny.quantize import QUANTIZATIONS
from msa_backend.tiny.shape import TinyShape


def add_parser(subparsers: Any) -> None:
    """Add the subcommand ``tiny`` to the action that ``ArgumentParser.add_subparsers`` returned."""
    parser = subparsers.add_parser(
        "tiny",
        help="write a small MiniMax-M3 checkpoint with random weights",
        description="Write a small MiniMax-M3 checkpoint with random weights. It loads and serves like the real "
        "model; expect gibberish for answers.",
    )
    parser.add_argument("directory", metavar="DIR", help="output directory; must not exist or be empty")
    parser.add_argument(
        "--form", choices=FORMS, default="original", help="weight names and config (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: %(default)s)")
    parser.add_argument(
        "--shards", type=int, default=1, metavar="N", help="number of weight files (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (default: %(default)s)")
    parser.add_argument(
        "--mtp-modules", type=int, default=0, metavar="N", help="modules that draft tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--quantization", choices=QUANTIZATIONS, help="of projections and experts (default: none); original form only"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that already exists in DIR")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the checkpoint that the parsed arguments describe; 0 on success, 1 with a sentence on stderr."""
    try:
        directory = write_tiny_checkpoint(
            args.directory,
            form=args.form,
            dtype=args.dtype,
            shards=args.shards,
            seed=args.seed,
            overwrite=args.overwrite,
            shape=TinyShape(mtp_modules=args.mtp_modules),
            quantization=args.quantization,
        )
    except (TinyCheckpointError, OSError) as error:
        print(f"msa-backend tiny: {error}", file=sys.stderr)
        return 1
    size = sum(file.stat().st_size for file in directory.iterdir() if file.is_file())
    print(f"wrote {directory}, {size / 1e6:.0f} MB: a small MiniMax-M3 with random weights; expect gibberish")
    return 0
