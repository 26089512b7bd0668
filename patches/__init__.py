"""One file per patch of an engine.

Each has ``NAME``, ``WHY`` (what it changes, and why no public call does it), ``CHECKED_ON`` (engine versions),
``RETIRED_BY`` (the upstream change that would make it needless), ``apply`` and ``status``. ``apply`` looks at the
shape of its target first and raises ``PatchError`` when it no longer fits.
"""

from msa_backend.config import MSAError


class PatchError(MSAError):
    """A patch whose target is no longer what it was."""

    def __init__(self, name: str, found: str, checked_on: tuple[str, ...]) -> None:
        super().__init__(
            f"the patch {name} does not fit this engine: {found}; install a version it was checked on "
            f"({', '.join(checked_on)}), or set MSA_DISABLE=1 to start without msa-backend"
        )
