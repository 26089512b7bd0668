"""Let the registered backend name cross a process boundary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msa_backend.names import BACKEND_NAME

from . import APPLIED, NOT_APPLIED, Patch, PatchError


def _apply(register: Callable[[], None]) -> None:
    """Make the registered member of vLLM's backend enum pickle as a call of ``restore``.

    Args:
        register: registers the member in the process that unpickles it. A function of a module, so that it pickles.
    """
    member = _member()
    try:
        member.__reduce_ex__ = lambda protocol: (restore, (register,))
    except AttributeError as error:
        raise PatchError(PATCH, f"members of AttentionBackendEnum refuse attributes ({error})") from error


def restore(register: Callable[[], None]) -> Any:
    """What the pickled member becomes: the member of this process, registered here if need be."""
    register()
    return _member()


def _status() -> str:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    member = AttentionBackendEnum.__members__.get(BACKEND_NAME)
    if member is None:
        return f"{NOT_APPLIED}: the backend is not registered in this process"
    return APPLIED if "__reduce_ex__" in vars(member) else NOT_APPLIED


def _member() -> Any:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return AttentionBackendEnum[BACKEND_NAME]


PATCH = Patch(
    name="vllm_backend_name",
    why=(
        "vLLM pickles a backend that was registered by name as its class path, and a spawned process unpickles it "
        "before plugins have registered it there, so the engine dies at start; pickled as a call that registers it "
        "first, it lives"
    ),
    checked_on=("vLLM 0.32", "vLLM 0.33"),
    retired_by=(
        "AttentionBackendEnum.register storing members that pickle by name, or plugins loaded before unpickling"
    ),
    apply=_apply,
    status=_status,
)
