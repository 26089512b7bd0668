"""msa_backend/vllm/media.py: what cannot be loaded is the client's mistake, another server's trouble is not."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import requests

from msa_backend.vllm.media import M3MediaConnector, use_own_connector


class Down:
    """Connections to another server, which end in what vLLM's two clients raise."""

    def get_bytes(self, url: str, **how: Any) -> bytes:
        raise requests.ConnectionError(url)

    async def async_get_bytes(self, url: str, **how: Any) -> bytes:
        raise aiohttp.ClientConnectionError(url)


def failure(connector: Any, url: str) -> list[BaseException]:
    """How images fail, as vLLM loads them for a server and as it does for everything else."""
    with pytest.raises(Exception) as found:
        connector.fetch_image(url)
    with pytest.raises(Exception) as of_server:
        asyncio.run(connector.fetch_image_async(url))
    return [found.value, of_server.value]


@pytest.mark.parametrize("name", ["absent.png", "", "../outside.png"])
def test_files(name: str, tmp_path: Path):
    from vllm.exceptions import VLLMValidationError

    (tmp_path / "outside.png").touch()
    (tmp_path / "allowed").mkdir()
    connector = M3MediaConnector(allowed_local_media_path=str(tmp_path / "allowed"))
    for error in failure(connector, f"file://{tmp_path}/allowed/{name}"):
        assert isinstance(error, VLLMValidationError)
        assert str(error).startswith("an image or video of the request cannot be loaded: ")


def test_a_server_that_is_down_is_nobodys_mistake():
    connection: Any = Down()
    found = failure(M3MediaConnector(connection=connection), "http://127.0.0.1/picture.png")
    assert list(map(type, found)) == [requests.ConnectionError, aiohttp.ClientConnectionError]


def test_vllm_takes_it_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch):
    from vllm import envs
    from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector

    class Other(MediaConnector):
        pass

    monkeypatch.setattr(MEDIA_CONNECTOR_REGISTRY, "name2class", {"http": MediaConnector, "other": Other})
    use_own_connector()
    assert type(MEDIA_CONNECTOR_REGISTRY.load(envs.VLLM_MEDIA_CONNECTOR)) is M3MediaConnector
    monkeypatch.setenv("VLLM_MEDIA_CONNECTOR", "other")
    assert type(MEDIA_CONNECTOR_REGISTRY.load(envs.VLLM_MEDIA_CONNECTOR)) is Other
