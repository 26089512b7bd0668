"""What engines need changed that no public call changes: one file, and one ``PATCH``, for each change.

``registry.py`` lists them, for ``msa-backend doctor`` and for the test that is run on each. To add one: write the
file, list it there, and give tests/patches/test_every_patch.py a target that it must refuse.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec

from msa_backend.config import MSAError

P = ParamSpec("P")

APPLIED = "applied"
NOT_APPLIED = "not applied"
NOT_NEEDED = "not needed"
_WRAPPED = "_msa_wrapped"


@dataclass(frozen=True)
class Patch(Generic[P]):
    """A change to an engine.

    Attributes:
        name: of its file; the engine's module in front, then what it changes.
        why: what it changes, and why no public call does it.
        checked_on: engines and their versions.
        retired_by: the upstream change that would make it needless.
        apply: looks at the shape of the target, then changes it. Raises ``PatchError`` where the target is no longer
            what it was.
        status: ``applied``, ``not applied`` or ``not needed`` in this process, with the reason after a colon.
            Raises ``ImportError`` where the engine is not installed.
    """

    name: str
    why: str
    checked_on: tuple[str, ...]
    retired_by: str
    apply: Callable[P, None]
    status: Callable[[], str]

    @property
    def engine(self) -> str:
        """The module of the engine it changes: ``vllm`` or ``sglang``."""
        return self.name.partition("_")[0]


class PatchError(MSAError):
    """A patch whose target is no longer what it was.

    Args:
        patch: the one that does not fit.
        found: what is wrong with its target.
    """

    def __init__(self, patch: Patch[...], found: str) -> None:
        super().__init__(
            f"the patch {patch.name} does not fit this engine: {found}; install a version it was checked on "
            f"({', '.join(patch.checked_on)}), or set MSA_DISABLE=1 to start without msa-backend"
        )


def wrap_method(
    patch: Patch[...], owner: type[Any], name: str, parameters: Sequence[str], around: Callable[..., Any]
) -> None:
    """Have ``owner.name(*parameters)`` call ``around(original, *parameters)``; once, however often this is called.

    Raises:
        PatchError: the method is gone, or takes other parameters.
    """
    original = getattr(owner, name, None)
    if original is None or list(inspect.signature(original).parameters) != list(parameters):
        raise PatchError(patch, f"{owner.__name__}.{name}({', '.join(parameters)}) is gone or changed")
    if hasattr(original, _WRAPPED):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    setattr(wrapped, _WRAPPED, True)
    setattr(owner, name, wrapped)


def status_of_method(owner: type[Any], name: str) -> str:
    """The status of a patch that :func:`wrap_method` applies."""
    return APPLIED if hasattr(getattr(owner, name), _WRAPPED) else NOT_APPLIED
