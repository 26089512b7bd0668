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
    # Handed in, because it is also what a spawned process has to call, and registration must not import this module.
    register(M3_ARCHITECTURES, register_vllm)


def register_sglang() -> None:
    """Entry point ``sglang.srt.plugins: msa``.

    SGLang logs what a plugin raises and serves on without it, with its in-tree class, but lets an exit pass.

    Raises:
        SystemExit: with one sentence, when this SGLang lacks something that is registered with, or that a patch needs.
    """
    if is_disabled():
        return
    try:
        from msa_backend.sglang.registration import register

        register(M3_ARCHITECTURES)
    except ImportError as error:
        raise SystemExit(f"msa-backend: {_unfit_sglang(error)}") from error
    except MSAError as error:
        raise SystemExit(f"msa-backend: {error}") from error


def _unfit_vllm(error: ImportError) -> MSAError:
    import vllm

    return _unfit("vLLM", "vllm", vllm.__version__, error)


def _unfit_sglang(error: ImportError) -> MSAError:
    import sglang

    return _unfit("SGLang", "sglang", sglang.__version__, error)


def _unfit(engine: str, distribution: str, version: str, error: ImportError) -> MSAError:
    return MSAError(
        f"{engine} is {version}, which lacks what msa-backend builds on ({error}); install one of "
        f"{supported_range(distribution)}, or set MSA_DISABLE=1 to start without msa-backend"
    )
