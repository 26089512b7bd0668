"""An image or a video that cannot be loaded is the client's mistake: vLLM's server then answers 400, not 500."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp
from vllm.exceptions import VLLMError, VLLMValidationError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector

CONNECTOR = "http"
"""What vLLM calls its own connector, which it loads unless VLLM_MEDIA_CONNECTOR names another."""


class M3MediaConnector(MediaConnector):
    """vLLM's own; a file that is not allowed, a decompression bomb or data without base64 were the server's fault."""

    def load_from_url(self, url: str, media_io: Any, **how: Any) -> Any:
        with _refusing(url):
            return super().load_from_url(url, media_io, **how)

    async def load_from_url_async(self, url: str, media_io: Any, **how: Any) -> Any:
        with _refusing(url):
            return await super().load_from_url_async(url, media_io, **how)


def use_own_connector() -> None:
    """Have this process load images and videos as above, unless the user named another connector."""
    MEDIA_CONNECTOR_REGISTRY.register(CONNECTOR)(M3MediaConnector)


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
