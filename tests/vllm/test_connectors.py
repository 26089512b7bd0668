"""KV connectors: what one engine computed another takes over, both caches of every sparse layer, or it is refused.

One engine stores by both routes that vLLM has, a second takes over by pages and a third by layers. Both are asked again
when the stored index keys are zero: that nothing fails then, and the answers are others, is why connectors are refused
until they are tested.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file, save_file

from ..compare import Answer, assert_same
from ..engines.capabilities import Can, needs
from ..engines.drivers import DRIVER
from ..engines.drivers.base import in_environment
from ..engines.drivers.running import Engine
from ..oracle import random_prompt
from ..refusal import sentence

# Long enough to choose among many blocks, and to share all but the pages of their last tokens.
ASKED = [random_prompt(length, seed=1) for length in (2500, 3333)]
REUSED = [2432, 3328]
NEW_TOKENS = 8
ALLOWED = {"MSA_ALLOW_UNTESTED": "1"}

pytestmark = needs(Can.KV_TRANSFER)


class Folders(NamedTuple):
    """Where the engines keep what they share."""

    pages: Path
    layers: Path


class TakenOver(NamedTuple):
    """Answers of an engine that takes over caches, and its answers when the index keys in them are zero."""

    whole: list[Answer]
    without_index_keys: list[Answer]


def by_pages(folder: Path) -> dict[str, Any]:
    return {
        "kv_connector": "PageConnector",
        "kv_role": "kv_both",
        "kv_connector_module_path": "page_connector",
        "kv_connector_extra_config": {"folder": str(folder)},
    }


def by_layers(folder: Path) -> dict[str, Any]:
    return {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(folder)},
    }


def several(*parts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"connectors": list(parts)},
    }


def ask(engine: Engine) -> list[Answer]:
    return engine.ask(ASKED, NEW_TOKENS)


def engine_with(
    model: Path, transfer: Mapping[str, Any], apart: bool = False, **own: Any
) -> AbstractContextManager[Engine]:
    return DRIVER.engine(model, apart=apart, own={"kv_transfer_config": dict(transfer)} | own)


@contextmanager
def own_connector() -> Iterator[None]:
    """The tests' own connector can be imported, in children too, and is not refused."""
    with pytest.MonkeyPatch.context() as patch, in_environment(ALLOWED):
        patch.syspath_prepend(str(Path(__file__).parent))
        yield


@pytest.fixture(scope="module")
def plain(tiny: Path) -> list[Answer]:
    """Answers of an engine without a connector."""
    with DRIVER.engine(tiny) as engine:
        return ask(engine)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("pages"), tmp_path_factory.mktemp("layers"))


@pytest.fixture(scope="module")
def stored(tiny: Path, folders: Folders) -> list[Answer]:
    """Answers of the engine that fills the folders."""
    with own_connector(), engine_with(tiny, several(by_pages(folders.pages), by_layers(folders.layers))) as engine:
        return ask(engine)


@pytest.fixture(scope="module", params=["pages", "layers"])
def taken_over(request: pytest.FixtureRequest, tiny: Path, folders: Folders, stored: Any) -> TakenOver:
    """The connector that is served, by layers, in processes of its own, as a server has them."""
    if request.param == "pages":
        with own_connector(), engine_with(tiny, by_pages(folders.pages)) as engine:
            return ask_twice(engine, folders.pages)
    with engine_with(tiny, by_layers(folders.layers), apart=True) as engine:
        return ask_twice(engine, folders.layers)


def ask_twice(engine: Engine, folder: Path) -> TakenOver:
    whole = ask(engine)
    zero_index_keys(folder)
    return TakenOver(whole, ask(engine))


def zero_index_keys(folder: Path) -> None:
    """Files are pages of all caches, or one cache for all pages of a prompt: then the file's name is the cache's."""
    zeroed = set()
    for file in filter(Path.is_file, folder.rglob("*")):
        caches = load_file(file)
        for name, content in caches.items():
            cache = file.stem if name == "kv_cache" else name
            if cache.endswith(".index_cache"):
                content.zero_()
                zeroed.add(cache)
        save_file(caches, file)
    assert len(zeroed) == 3, "the tiny model has three sparse layers"


def assert_equal(found: Sequence[Answer], expected: Sequence[Answer]) -> None:
    for answer, other in zip(found, expected, strict=True):
        assert answer.tokens == other.tokens
        assert_same(answer, other)


def test_storing_changes_no_answer(stored: list[Answer], plain: list[Answer]):
    assert [answer.cached for answer in stored] == [0, 0]
    assert_equal(stored, plain)


def test_both_caches_are_taken_over(taken_over: TakenOver, plain: list[Answer]):
    assert [answer.cached for answer in taken_over.whole] == REUSED
    assert_equal(taken_over.whole, plain)


def test_lost_index_keys_would_show(taken_over: TakenOver, plain: list[Answer]):
    assert [answer.cached for answer in taken_over.without_index_keys] == REUSED
    for answer, other in zip(taken_over.without_index_keys, plain, strict=True):
        with pytest.raises(AssertionError):
            assert_same(answer, other)


@needs(Can.FP8_CACHES)
def test_fp8_caches_are_taken_over(tiny: Path, tmp_path: Path):
    """Whether their bytes are moved by layers or by pages."""
    fp8 = {"kv_cache_dtype": "fp8", "attention_config": {"indexer_kv_dtype": "fp8"}}
    folders = Folders(tmp_path / "pages", tmp_path / "layers")
    for folder in folders:
        folder.mkdir()
    both = several(by_pages(folders.pages), by_layers(folders.layers))
    with own_connector(), engine_with(tiny, both, **fp8) as engine:
        stored = ask(engine)
    for transfer, folder in ((by_layers(folders.layers), folders.layers), (by_pages(folders.pages), folders.pages)):
        with own_connector(), engine_with(tiny, transfer, **fp8) as engine:
            found = ask_twice(engine, folder)
        assert [answer.cached for answer in found.whole] == REUSED
        apart = [max(map(distance, answers, stored)) for answers in found]
        print(f"{transfer['kv_connector']}: {apart[0]:.1e}, without index keys {apart[1]:.1e}")
        # A new number may be rounded to another of fp8 than when all were computed at once.
        assert apart[0] < 5e-3 and apart[1] > 10 * 5e-3


def distance(answer: Answer, other: Answer) -> float:
    return max(abs(a - b) for a, b in zip(answer.logprobs, other.logprobs, strict=True))


def refusal(model: Path, **options: Any) -> str:
    return sentence(DRIVER.parse, model, **options)


def named(connector: str, **more: Any) -> dict[str, Any]:
    return {"own": {"kv_transfer_config": {"kv_connector": connector, "kv_role": "kv_both"} | more}}


UNFIT = {
    "LMCacheConnectorV1": "stores K and V alone",
    "LMCacheConnectorV1Dynamic": "stores K and V alone",
    "HF3FSKVConnector": "takes caches of one shape alone",
    "HiSparseConnector": "serves the sparse attention of MLA models alone",
}
BOTH = "which by its source moves both caches of a sparse layer"
UNTESTED = {
    "OffloadingConnector": f"{BOTH} on GPUs alone",
    "SimpleCPUOffloadConnector": f"{BOTH} on GPUs alone",
    "NixlConnector": f"{BOTH}, but not with pipeline parallelism",
    "NixlPullConnector": f"{BOTH}, but not with pipeline parallelism",
    "NixlPushConnector": f"{BOTH}, but not with pipeline parallelism",
    "MooncakeConnector": f"{BOTH} between servers of equal tensor parallelism",
    "MooncakeStoreConnector": BOTH,
    "DecodeBenchConnector": "which by its source fills both caches",
    "LMCacheMPConnector": "",
    "MoRIIOConnector": "",
    "FlexKVConnectorV1": "",
    "ExampleHiddenStatesConnector": "",
}


def test_every_connector_of_vllm_is_looked_at():
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    assert set(KVConnectorFactory._registry) <= {"ExampleConnector", "MultiConnector", *UNFIT, *UNTESTED}


@pytest.mark.parametrize("connector", UNFIT)
@pytest.mark.parametrize("allowed", [{}, ALLOWED], ids=["", "allowed"])
@pytest.mark.parametrize("within", [False, True], ids=["", "in a MultiConnector"])
def test_connectors_that_lose_index_keys(tiny: Path, connector: str, allowed: dict[str, str], within: bool):
    options = named(connector)
    if within:
        parts = several(by_layers(tiny), several(options["own"]["kv_transfer_config"]))
        options = {"own": {"kv_transfer_config": parts}}
    with in_environment(allowed):
        message = refusal(tiny, **options)
    assert f"--kv-transfer-config names {connector}, which {UNFIT[connector]}" in message
    assert "name ExampleConnector, or set MSA_DISABLE=1" in message


def assert_untested(message: str, given: str) -> None:
    assert message.startswith(given)
    assert "but msa-backend is tested with ExampleConnector on 1 cpu rank only; set MSA_ALLOW_UNTESTED=1" in message


@pytest.mark.parametrize(("connector", "known"), UNTESTED.items())
def test_connectors_that_were_not_run(tiny: Path, connector: str, known: str):
    message = refusal(tiny, **named(connector))
    assert_untested(message, f"--kv-transfer-config names {connector} on 1 cpu rank, {known or 'but'}")


@pytest.mark.parametrize("connector", ["ExampleConnector", "NixlConnector", "MultiConnector"])
def test_a_connector_of_the_users_own(tiny: Path, connector: str):
    """Its name may be one of vLLM's."""
    message = refusal(tiny, **named(connector, kv_connector_module_path="mine"))
    assert_untested(message, f"--kv-transfer-config names {connector} on 1 cpu rank, but")


def test_more_ranks_than_were_tested(tiny: Path):
    message = refusal(tiny, ranks=2, **named("ExampleConnector"))
    assert_untested(message, "--kv-transfer-config names ExampleConnector on 2 cpu ranks, but")


@pytest.mark.parametrize("backend", ["native", "lmcache"])
def test_the_option_that_names_no_connector(tiny: Path, backend: str):
    message = refusal(tiny, own={"kv_offloading_size": 1.0, "kv_offloading_backend": backend})
    assert_untested(message, f"--kv-offloading-size is 1, which adds a KV connector of the {backend} backend, but")


def test_what_was_not_run_can_be_tried(tiny: Path):
    """As far as the option parsing goes; an engine of the tests' own connector runs above."""
    with in_environment(ALLOWED):
        assert DRIVER.parse(tiny, **named("DecodeBenchConnector")).topk


@pytest.mark.parametrize("transfer", [by_layers, lambda folder: several(by_layers(folder))], ids=["itself", "a part"])
def test_what_was_run_needs_no_permission(tiny: Path, transfer: Any):
    assert DRIVER.parse(tiny, own={"kv_transfer_config": transfer(tiny)}).topk
