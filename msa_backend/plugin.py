"""The entry points through which engines find MSA. Safe to call twice, and in every process of an engine."""

from __future__ import annotations

import os

from msa_backend.config import MSAError
from msa_backend.names import M3_ARCHITECTURES
from msa_backend.versions import supported_range


def is_disabled() -> bool:
    """Whether the user took the plugin out, with ``MSA_DISABLE=1``."""
    return os.environ.get("MSA_DISABLE", "0") not in ("", "0")


def register_vllm() -> None:
    """Entry point ``vllm.general_plugins: msa``.

    Raises:
        MSAError: this vLLM lacks something that is registered with, or that a patch needs.
    """
    if is_disabled():
        return
    try:
        from msa_backend.vllm.registration import register
    except ImportError as error:
        raise _unfit_vllm(error) from error
    register(M3_ARCHITECTURES)


def _unfit_vllm(error: ImportError) -> MSAError:
    import vllm

    return MSAError(
        f"vLLM is {vllm.__version__}, which lacks what msa-backend builds on ({error}); install one of "
        f"{supported_range('vllm')}, or set MSA_DISABLE=1 to start without msa-backend"
    )
