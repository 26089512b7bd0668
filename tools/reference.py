"""Writes docs/options.md, every flag and variable, from the code: ``python tools/reference.py``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from msa_backend import cli

PAGE = Path(__file__).resolve().parent.parent / "docs" / "options.md"

VARIABLES = {
    "MSA_DISABLE": "`1`: the plugin does nothing, in every process that has it",
    "MSA_ALLOW_UNTESTED": "`1`: try what is refused because no test has run it",
    "MSA_SHARED_SCORING": "a number of tokens: the ranks share the scoring of blocks in steps with at least so long a "
    "context; unset: in none ([how](kernels.md#scoring-shared-among-ranks-topk_of_sharepy))",
    "MSA_MAX_REQUEST_MB": "megabytes of a request's body, with the middleware `RequestLimit` "
    "([limits](calling-m3.md#errors-and-limits))",
    "MSA_MAX_IMAGE_MB": "megabytes of an image in a request",
    "MSA_MAX_VIDEO_MB": "megabytes of a video in a request",
}
HEAD = """# Every flag and variable

Made by `python tools/reference.py`; a test compares it with the code.

## Names that engines are given

| | vLLM | SGLang |
|---|---|---|
| attention | `--attention-backend msa` | `--attention-backend msa` |
| thinking | `--reasoning-parser msa_minimax_m3` | - |
| modes of thinking | `--middleware msa_backend.vllm.thinking.ThinkingMode` ([why](calling-m3.md#thinking)) | - |
| tools | `--tool-call-parser msa_minimax_m3`, with `--enable-auto-tool-choice` | - |
| Anthropic's errors in `/v1/messages` | `--middleware msa_backend.vllm.anthropic_errors.AnthropicErrors` | - |
| a limit of requests | `--middleware msa_backend.vllm.request_limit.RequestLimit` | - |
| in `transformers` | `attn_implementation="msa"`, after `msa_backend.transformers.register()` | |

All other flags are the engines' own; [the same thing in both](what-works.md#the-same-thing-in-both-engines).

## Environment variables
"""


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of a subcommand."""
    subparsers = argparse.ArgumentParser(prog="msa-backend").add_subparsers()
    import_module(cli.COMMANDS[command][0]).add_parser(subparsers)
    return subparsers.choices[command]


def with_nested(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of its subcommands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


def rows(parser: argparse.ArgumentParser) -> Iterator[str]:
    """A line of a table for each argument but ``--help``."""
    for action in parser._actions:  # argparse has no public list of them
        if isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
            continue
        value = action.metavar or ("{" + ",".join(map(str, action.choices)) + "}" if action.choices else "")
        name = ", ".join(action.option_strings) or str(value or action.dest)
        shown = f"{name} {value}".strip() if action.option_strings and action.nargs != 0 else name
        text = (action.help or "") % {"default": action.default, "prog": parser.prog}
        yield "| `{}` | {} |".format(*(part.replace("|", "\\|") for part in (shown, text)))


def page() -> str:
    """The whole page."""
    lines = [HEAD, "| | |", "|---|---|", *(f"| `{name}` | {text} |" for name, text in VARIABLES.items())]
    for command in cli.COMMANDS:
        for parser in with_nested(parser_of(command)):
            lines += ["", f"## `{parser.prog}`", "", parser.description or "", "", "| | |", "|---|---|"]
            lines += rows(parser)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
