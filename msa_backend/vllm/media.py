"""An image or a video that cannot be loaded is the client's mistake: vLLM's server then answers 400, not 500."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
from vllm.exceptions import VLLMError, VLLMValidationError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector, VideoMediaIO

from .limits import IMAGE, VIDEO, limit, too_large

CONNECTOR = "http"
"""What vLLM calls its own connector, which it loads unless VLLM_MEDIA_CONNECTOR names another."""


class M3MediaConnector(MediaConnector):
    """vLLM's own; a file that is not allowed, a decompression bomb or data without base64 were the server's fault.

    What is larger than :mod:`.limits` allows is not unpacked.
    """

    def load_from_url(self, url: str, media_io: Any, **how: Any) -> Any:
        with _refusing(url):
            return super().load_from_url(url, _limited(media_io), **how)

    async def load_from_url_async(self, url: str, media_io: Any, **how: Any) -> Any:
        with _refusing(url):
            return await super().load_from_url_async(url, _limited(media_io), **how)


def use_own_connector() -> None:
    """Have this process load images and videos as above, unless the user named another connector.

    Raises:
        MSAError: a limit that is no number.
    """
    for variable in (IMAGE, VIDEO):
        limit(variable)
    MEDIA_CONNECTOR_REGISTRY.register(CONNECTOR)(M3MediaConnector)


def _limited(media_io: Any) -> Any:
    what, variable = ("the video", VIDEO) if isinstance(media_io, VideoMediaIO) else ("the image", IMAGE)
    allowed = limit(variable)
    return media_io if allowed is None else _Limited(media_io, what, allowed)


class _Limited:
    """Loads what is small enough, counted as it was sent or stored, before it is unpacked."""

    def __init__(self, media_io: Any, what: str, allowed: int) -> None:
        self._media_io, self._what, self._allowed = media_io, what, allowed

    def get_max_bytes(self) -> int:
        return self._allowed

    def load_bytes(self, data: bytes) -> Any:
        self._check(len(data))
        return self._media_io.load_bytes(data)

    def load_base64(self, media_type: str, data: str) -> Any:
        self._check(len(data) * 3 // 4 - data[-2:].count("="))
        return self._media_io.load_base64(media_type, data)

    def load_file(self, filepath: Path) -> Any:
        self._check(filepath.stat().st_size)
        return self._media_io.load_file(filepath)

    def _check(self, size: int) -> None:
        if size > self._allowed:
            raise VLLMValidationError(too_large(self._what, size, self._allowed))


@contextmanager
def _refusing(url: str) -> Iterator[None]:
    try:
        yield
    except VLLMError:
        raise
    except Exception as error:
        # Another server that is down or slow is nobody's mistake: vLLM's answer invites to try again.
        if url[:4].lower() == "http" and isinstance(error, (OSError, aiohttp.ClientError)):
            raise
        raise VLLMValidationError(f"an image or video of the request cannot be loaded: {error}") from error
