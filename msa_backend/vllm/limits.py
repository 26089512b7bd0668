"""How large a request, an image and a video may be, for servers that strangers call. Without limits unless set."""

from __future__ import annotations

import os

from msa_backend.config import MSAError

REQUEST, IMAGE, VIDEO = "MSA_MAX_REQUEST_MB", "MSA_MAX_IMAGE_MB", "MSA_MAX_VIDEO_MB"
MB = 1 << 20


def limit(variable: str) -> int | None:
    """Bytes that an environment variable allows, which counts in MB; None if it is not set.

    Raises:
        MSAError: not a positive number.
    """
    given = os.environ.get(variable)
    if given is None:
        return None
    try:
        allowed = int(float(given) * MB)
    except (ValueError, OverflowError):
        allowed = 0
    if allowed < 1:
        raise MSAError(f"{variable} is {given!r}, but must be a positive number of MB; unset it and there is no limit")
    return allowed


def too_large(what: str, size: int, allowed: int) -> str:
    """A sentence for who sent it."""
    return f"{what} is {size / MB:.1f} MB, but this server takes {allowed / MB:g} MB at most; send a smaller one"
