"""A KV connector of the page route: a folder of pages, each with what every registered cache has of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import sha256
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata

Pages = list[tuple[int, Path]]


@dataclass
class Transfers(KVConnectorMetadata):
    """Ids of pages and their files, to read before a step and to write after it."""

    load: Pages = field(default_factory=list)
    save: Pages = field(default_factory=list)


class PageConnector(KVConnectorBase_V1):
    """Loads and saves whole prompts, each computed in one step."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self.folder = Path(self._kv_transfer_config.get_from_extra_config("folder", None))
        self.page_size = vllm_config.cache_config.block_size
        self.found: dict[str, int] = {}

    def files(self, tokens: list[int]) -> list[Path]:
        """Of each full page before the last token, which must be computed; by all tokens up to the page's end."""
        ends = range(self.page_size, len(tokens), self.page_size)
        return [self.folder / sha256(repr(tokens[:end]).encode()).hexdigest() for end in ends]

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        found = len(list(takewhile(Path.exists, self.files(request.prompt_token_ids))))
        return max(0, found * self.page_size - num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self.found[request.request_id] = num_external_tokens // self.page_size

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        transfers = Transfers()
        for new in scheduler_output.scheduled_new_reqs:
            scheduled = scheduler_output.num_scheduled_tokens[new.req_id]
            assert new.num_computed_tokens + scheduled == len(new.prompt_token_ids)
            pages = list(zip(new.block_ids[0], self.files(new.prompt_token_ids), strict=False))
            found = self.found.pop(new.req_id)
            transfers.load += pages[:found]
            transfers.save += pages[found:]
        return transfers

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self.caches = kv_caches

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        for page, file in self._get_connector_metadata().load:
            for name, content in load_file(file).items():
                self.caches[name][page] = content

    def wait_for_save(self) -> None:
        for page, file in self._get_connector_metadata().save:
            save_file({name: cache[page].contiguous() for name, cache in self.caches.items()}, file)

    def wait_for_layer_load(self, layer_name: str) -> None: ...

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None: ...
