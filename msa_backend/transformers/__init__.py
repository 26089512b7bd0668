"""MSA as an attention function of ``transformers``: :func:`register`, then ``attn_implementation="msa"``."""

from __future__ import annotations

from typing import Any

from msa_backend.names import BACKEND_NAME
from msa_backend.refusals import check_tested

NAME = BACKEND_NAME.lower()
"""What ``attn_implementation`` is given."""
MINIMUM_VERSION = "5.19"
"""The first ``transformers`` that this was tested with."""


def register() -> None:
    """Make ``attn_implementation="msa"`` known to ``transformers``, in this process; again does nothing new.

    The model refuses in its first call: a device other than a CPU unless ``MSA_ALLOW_UNTESTED=1``, a model other than
    MiniMax-M3, gradients, a static cache, and prompts that are padded on the left.

    Raises:
        ImportError: ``transformers`` is not installed.
    """
    from . import attention

    attention.register(NAME, _attention)


def _attention(module: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
    from .attention import attention

    if query.device.type != "cpu":
        check_tested(
            f"attn_implementation is {NAME!r} on {query.device}",
            "transformers on a CPU",
            otherwise='attn_implementation="sdpa" to do without msa-backend',
        )
    return attention(module, query, *args, **kwargs)
