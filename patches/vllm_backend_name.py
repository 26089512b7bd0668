"""Let the registered backend name cross a process boundary."""

from __future__ import annotations

from typing import Any

from msa_backend.names import BACKEND_NAME

from . import PatchError

NAME = "vllm_backend_name"
WHY = (
    "vLLM pickles a backend that was registered by name as its class path, and a spawned process unpickles it before "
    "plugins have registered it there, so the engine dies at start; pickled as a call that registers it first, it lives"
)
CHECKED_ON = ("vLLM 0.32", "vLLM 0.33")
RETIRED_BY = "AttentionBackendEnum.register storing members that pickle by name, or plugins loaded before unpickling"


def apply(name: str) -> None:
    """Make the registered member ``name`` of vLLM's backend enum pickle as a call of ``restore``.

    Raises:
        PatchError: the member does not take the attribute.
    """
    member = _member(name)
    try:
        member.__reduce_ex__ = lambda protocol: (restore, (name,))
    except AttributeError as error:
        raise PatchError(NAME, f"members of AttentionBackendEnum refuse attributes ({error})", CHECKED_ON) from error


def restore(name: str) -> Any:
    """What the pickled member becomes: the member of this process, registered here if need be."""
    from msa_backend.plugin import register_vllm

    register_vllm()
    return _member(name)


def status() -> str:
    """``applied``, or why not."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    member = AttentionBackendEnum.__members__.get(BACKEND_NAME)
    if member is None:
        return "not applied: the backend is not registered in this process"
    return "applied" if "__reduce_ex__" in vars(member) else "not applied"


def _member(name: str) -> Any:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return AttentionBackendEnum[name]
