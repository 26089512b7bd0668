"""The `msa-backend` command. A subcommand's module is imported only when it is the one asked for."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from msa_backend import __version__

# Each module has `add_parser(subparsers)`, which sets the default `run`: called with the parsed
# arguments, it returns the exit status.
COMMANDS = {
    "bench": ("msa_backend.bench", "benchmark MSA's kernels against the engines' own and dense attention"),
    "doctor": ("msa_backend.doctor", "check the installation: versions, what is supported, whether the plugin works"),
    "inspect": ("msa_backend.inspect", "show which blocks a checkpoint selects, and how much attention they hold"),
    "probe": ("msa_backend.probe", "check that a server finds facts anywhere in a long prompt"),
    "size": ("msa_backend.size", "compute what a model takes on given GPUs, and what MSA saves at a length"),
    "tiny": ("msa_backend.tiny", "write a small MiniMax-M3 checkpoint with random weights"),
}


def _parser(asked_for: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="msa-backend", description="MiniMax Sparse Attention (MSA) and MiniMax-M3 for stock vLLM and stock SGLang."
    )
    parser.add_argument("--version", action="version", version=f"msa-backend {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (module, summary) in COMMANDS.items():
        if name == asked_for:
            import_module(module).add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    asked_for = next((argument for argument in arguments if not argument.startswith("-")), None)
    options = _parser(asked_for).parse_args(arguments)
    return options.run(options) or 0


if __name__ == "__main__":
    sys.exit(main())
