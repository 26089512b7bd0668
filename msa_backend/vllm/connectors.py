"""Which of vLLM's KV connectors move the two caches of a sparse layer together.

One page id names a page of K and V and a page of index keys. A connector that moves the first without the second leaves
stale index keys behind: past top-k blocks MSA then attends to the wrong ones, and nothing fails. So only what a test
has moved is served, and what is known to lose index keys is refused whatever the user allows.

vLLM knows two routes. By pages, the engine hands a connector every registered cache, index keys among them, and the
layers owe it nothing. By layers, each layer hands over its own caches as it runs: ``layer.py`` does so for both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from msa_backend import refusals
from msa_backend.config import MSAError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

TESTED = "ExampleConnector"
"""Moves both caches by layers; run on one rank of a CPU.

With more ranks its files overwrite each other. On a GPU, a step that replays a full CUDA graph hands over nothing by
layers: that is so for every model of vLLM.
"""

UNFIT: Mapping[str, str] = {
    "LMCacheConnectorV1": "stores K and V alone and would leave stale index keys behind",
    # The same by the name in LMCache's own package.
    "LMCacheConnectorV1Dynamic": "stores K and V alone and would leave stale index keys behind",
    "HF3FSKVConnector": "takes caches of one shape alone, and index keys have another than K and V",
    "HiSparseConnector": "serves the sparse attention of MLA models alone",
}
"""Why a connector cannot carry a sparse layer's caches, as the end of a sentence that begins with its name."""

READ: Mapping[str, str] = {
    "DecodeBenchConnector": "fills both caches of a sparse layer with invented values",
    "MooncakeConnector": "moves both caches of a sparse layer between servers of equal tensor parallelism",
    "MooncakeStoreConnector": "moves both caches of a sparse layer",
    "NixlConnector": "moves both caches of a sparse layer, but not with pipeline parallelism",
    "NixlPullConnector": "moves both caches of a sparse layer, but not with pipeline parallelism",
    "NixlPushConnector": "moves both caches of a sparse layer, but not with pipeline parallelism",
    "OffloadingConnector": "moves both caches of a sparse layer on GPUs alone",
    "SimpleCPUOffloadConnector": "moves both caches of a sparse layer on GPUs alone",
}
"""What the source of vLLM 0.33 says of connectors that were not run: it hands pages of every cache to each of them."""


def check_connectors(vllm_config: VllmConfig) -> None:
    """Refuse connectors that would part the caches of a sparse layer, and those that no test has run.

    Raises:
        MSAError: with the one sentence for the user. ``MSA_ALLOW_UNTESTED=1`` lets pass what was merely not run.
    """
    from vllm.platforms import current_platform

    ranks, device = vllm_config.parallel_config.world_size, current_platform.device_type
    tested = f"{TESTED} on 1 cpu rank"
    cache = vllm_config.cache_config
    if cache.kv_offloading_size is not None:
        # Later in its start-up vLLM puts a connector of its choice in the place of any that is named.
        refusals.check_tested(
            f"--kv-offloading-size is {cache.kv_offloading_size:g}, which adds a KV connector of the "
            f"{cache.kv_offloading_backend} backend",
            tested,
        )
        return
    transfer = vllm_config.kv_transfer_config
    if transfer is None or transfer.kv_connector is None:
        return
    for part in _parts(vars(transfer)):
        name = part.get("kv_connector", "no connector")
        if name in UNFIT:
            raise MSAError(
                f"--kv-transfer-config names {name}, which {UNFIT[name]}; leave it out or name {TESTED}, "
                "or set MSA_DISABLE=1 to serve without msa-backend"
            )
        foreign = part.get("kv_connector_module_path")
        if name == TESTED and not foreign and (ranks, device) == (1, "cpu"):
            continue
        known = f", which by its source {READ[name]}" if name in READ and not foreign else ""
        refusals.check_tested(
            f"--kv-transfer-config names {name} on {ranks} {device} rank{'s' if ranks > 1 else ''}{known}", tested
        )


def _parts(transfer: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The connectors of a config, each by vLLM's own keys: itself, or those that a MultiConnector is made of."""
    if transfer.get("kv_connector") != "MultiConnector" or transfer.get("kv_connector_module_path"):
        yield transfer
        return
    for part in transfer.get("kv_connector_extra_config", {}).get("connectors", []):
        yield from _parts(part)
