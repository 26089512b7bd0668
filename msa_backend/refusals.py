"""The sentences in which both engines refuse the same thing. Free of every engine."""

from __future__ import annotations

import os
from collections.abc import Iterable

from msa_backend.config import MSAConfig, MSAError
from msa_backend.kernels.batch import BLOCK_SIZE
from msa_backend.names import BACKEND_NAME

ALLOW_UNTESTED = "MSA_ALLOW_UNTESTED"
"""Set to 1 by a user who wants to try what no test has run."""


def check_tested(given: str, tested: str, otherwise: str = "MSA_DISABLE=1 to serve without msa-backend") -> None:
    """Refuse what no test has run on this engine and device, unless the user asked to try it.

    Args:
        given: what the user has, as the beginning of a sentence.
        tested: what there is instead.
        otherwise: what does without this package.

    Raises:
        MSAError: always, but for ``MSA_ALLOW_UNTESTED=1``.
    """
    if os.environ.get(ALLOW_UNTESTED, "0") in ("", "0"):
        raise MSAError(
            f"{given}, but msa-backend is tested with {tested} only; set {ALLOW_UNTESTED}=1 to try it all the same, "
            f"or {otherwise}"
        )


def check_quantization(method: str, on_cpu: bool, tested: str = "unquantized weights", is_tested: bool = False) -> None:
    """Refuse quantized weights: on a CPU altogether, elsewhere until a test has run them.

    Args:
        tested: what was run elsewhere.
        is_tested: whether these are among it.
    """
    if on_cpu:
        raise MSAError(
            f"quantization is {method}, but on a CPU MSA serves unquantized weights only; serve this model on a GPU"
        )
    if not is_tested:
        check_tested(f"quantization is {method}", tested)


def page_size(option: str, value: int) -> MSAError:
    return MSAError(
        f"{option} is {value}, but MSA needs {BLOCK_SIZE}, one KV-cache page per sparse block; "
        f"omit it or pass {BLOCK_SIZE}"
    )


def check_even_heads(option: str, ranks: int, config: MSAConfig) -> None:
    """Refuse a number of tensor-parallel ranks over which the heads do not split."""
    if config.num_heads % ranks or (config.num_kv_heads % ranks and ranks % config.num_kv_heads):
        raise MSAError(
            f"{option} is {ranks}, but {config.num_heads} query heads and {config.num_kv_heads} KV heads "
            f"only split evenly over a divisor or a multiple of {config.num_kv_heads}; choose one"
        )


def no_msa_layers(model: str, found: Iterable[str], architectures: Iterable[str]) -> MSAError:
    return MSAError(
        f"--attention-backend {BACKEND_NAME.lower()} was given, but {model} is {' or '.join(found)}, which has no MSA "
        f"layers; leave the flag out, or serve one of {', '.join(sorted(architectures))}"
    )
