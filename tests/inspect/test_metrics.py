"""What is measured chunk by chunk in fp32 is what brute force finds in fp64, for every metric and selector."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import pytest
import torch

from msa_backend.inspect import report
from msa_backend.inspect.forward import Seen
from msa_backend.inspect.measure import Measures
from msa_backend.inspect.plan import Plan, sample
from msa_backend.inspect.selectors import SELECTORS
from msa_backend.kernels.selection import Selection
from msa_backend.transformers import dense
from msa_backend.transformers.attention import ascending

from . import brute

TOKENS, BLOCK, TOPK, LOCAL = 203, 16, 3, 1
SELECTION = Selection(TOPK, local_blocks=LOCAL)
TARGET = (30, 50)  # blocks 1 to 3
CHUNK = 48
LAYERS = {2: brute.layer(0, TOKENS), 3: brute.layer(1, TOKENS), 5: brute.layer(2, TOKENS)}
SETTINGS = ((8, Selection(2)), (16, SELECTION), (16, Selection(5, local_blocks=2)), (32, Selection(5)))
QUERIES = sample(TOKENS, BLOCK, SELECTION, 24)
GROUPS = 2
CHOSEN = {
    number: [[brute.msa(layer, g, t, BLOCK, TOPK, LOCAL) for t in range(TOKENS)] for g in range(GROUPS)]
    for number, layer in LAYERS.items()
}


def block_ids(number: int, start: int, stop: int) -> torch.Tensor:
    rows = [[sorted(of_query) for of_query in of_group[start:stop]] for of_group in CHOSEN[number]]
    return torch.tensor([[row + [-1] * (TOPK - len(row)) for row in of_group] for of_group in rows], dtype=torch.int32)


def measured(chunk: int = CHUNK) -> dict[str, Any]:
    measures = Measures(Plan(TOKENS, tuple(LAYERS), BLOCK, SELECTION, TARGET, QUERIES, SETTINGS), GROUPS)
    for start in range(0, TOKENS, chunk):
        stop = min(start + chunk, TOKENS)
        for number, of in LAYERS.items():
            seen = Seen(
                of.q[:, start:stop].float(),
                of.k[:, :stop].float(),
                of.index_q[:, start:stop].float(),
                of.index_k[:stop].float(),
                block_ids(number, start, stop),
                of.scale,
            )
            measures.observe(number, seen)
        measures.observe(4, seen)  # a layer that was not asked for
    return report.result(measures)


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return measured()["groups"]


def near(value: float) -> Any:
    return pytest.approx(value, abs=2e-5)


def test_queries_are_groups_of_four_that_select():
    assert len(QUERIES) == 24
    assert QUERIES[-1] == TOKENS - 1
    for first in QUERIES[::4]:
        assert first % 4 == TOKENS % 4
        assert {*range(first, first + 4)} <= {*QUERIES}
    assert TOPK * BLOCK <= QUERIES[0] < 80  # they reach to the front
    assert sample(TOKENS, BLOCK, SELECTION, 10_000) == tuple(range(51, 203))
    assert sample(52, BLOCK, SELECTION, 1) == (48, 49, 50, 51)


def test_every_layer_and_group_in_order(found: list[dict[str, Any]]):
    assert [(entry["layer"], entry["group"]) for entry in found] == [(n, g) for n in LAYERS for g in range(GROUPS)]


def test_the_blocks_themselves(found: list[dict[str, Any]]):
    for entry in found:
        chosen = CHOSEN[entry["layer"]][entry["group"]]
        assert entry["blocks"] == [sorted(chosen[t]) for t in QUERIES]


@pytest.mark.parametrize("selector", SELECTORS)
def test_recall(selector: str, found: list[dict[str, Any]]):
    for entry in found:
        of, g = LAYERS[entry["layer"]], entry["group"]
        assert entry["recall"][selector] == near(
            fmean(brute.recalls(of, g, t, BLOCK, TOPK, LOCAL)[selector] for t in QUERIES)
        )


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("setting", range(len(SETTINGS)))
def test_sweep(setting: int, selector: str, found: list[dict[str, Any]]):
    size, selection = SETTINGS[setting]
    asked = [t for t in QUERIES if t // size + 1 > selection.topk]
    assert 0 < len(asked) <= len(QUERIES)
    for entry in found[:3]:
        of, g = LAYERS[entry["layer"]], entry["group"]
        swept = entry["sweep"][setting]
        assert (swept["block_size"], swept["topk"]) == (size, selection.topk)
        assert swept[selector] == near(
            fmean(brute.recalls(of, g, t, size, selection.topk, selection.local_blocks)[selector] for t in asked)
        )


def test_a_setting_that_selects_all_is_not_answered():
    measures = Measures(
        Plan(TOKENS, (2,), BLOCK, SELECTION, None, QUERIES, ((64, Selection(4)), (64, Selection(8)))), GROUPS
    )
    of = LAYERS[2]
    measures.observe(2, Seen(of.q, of.k, of.index_q, of.index_k, block_ids(2, 0, TOKENS), of.scale))
    assert {entry["sweep"][0]["msa"] for entry in report.result(measures)["groups"]} == {None}
    assert "    64     4     256       -" in "\n".join(report.lines(report.result(measures)))


def test_distinct_blocks_of_neighbours(found: list[dict[str, Any]]):
    for entry in found:
        chosen = CHOSEN[entry["layer"]][entry["group"]]
        assert entry["distinct"] == near(
            fmean(len(set().union(*(chosen[t + i] for i in range(4)))) for t in QUERIES[::4])
        )


def test_blocks_shared_by_layers(found: list[dict[str, Any]]):
    for entry in found:
        chosen = CHOSEN[entry["layer"]][entry["group"]]
        for other in LAYERS:
            also = CHOSEN[other][entry["group"]]
            shared = fmean(len(chosen[t] & also[t]) / TOPK for t in QUERIES)
            assert entry["shared_with"][str(other)] == near(shared)


PLACES = {
    "first": lambda t: {0},
    "local": lambda t: {t // BLOCK},
    "target": lambda t: {1, 2, 3} if t >= TARGET[1] else None,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("when", ["", "_last"])
def test_mass_and_choice_of_places(place: str, when: str, found: list[dict[str, Any]]):
    for entry in found:
        of, g = LAYERS[entry["layer"]], entry["group"]
        mass, chosen = [], []
        for t in QUERIES[-4:] if when else QUERIES:
            if blocks := PLACES[place](t):
                of_token = of.mass(g, t)
                mass.append(sum(of_token[s] for b in blocks for s in brute.tokens_of(b, BLOCK, t)))
                chosen.append(len(blocks & CHOSEN[entry["layer"]][g][t]) / len(blocks))
        assert entry[f"mass{when}"][place] == near(fmean(mass))
        assert entry[f"chosen{when}"][place] == near(fmean(chosen))


def test_a_target_that_no_query_follows():
    measures = Measures(Plan(TOKENS, (2,), BLOCK, SELECTION, (200, 203), QUERIES, SETTINGS), GROUPS)
    of = LAYERS[2]
    measures.observe(2, Seen(of.q, of.k, of.index_q, of.index_k, block_ids(2, 0, TOKENS), of.scale))
    assert report.result(measures)["groups"][0]["mass"]["target"] is None


@pytest.mark.parametrize("bins", [64, 5])
def test_the_map_shows_every_query(bins: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("msa_backend.inspect.maps.BINS", bins)
    result = measured()
    wide, num_blocks = result["bin_blocks"], -(-TOKENS // BLOCK)
    assert wide == (1 if bins == 64 else 3)
    for entry in result["groups"]:
        chosen = CHOSEN[entry["layer"]][entry["group"]]
        for row, shares in enumerate(entry["map"]):
            queries = range(row * wide * BLOCK, min((row + 1) * wide * BLOCK, TOKENS))
            for column, share in enumerate(shares):
                blocks = range(column * wide, min((column + 1) * wide, num_blocks))
                assert share == pytest.approx(fmean(b in chosen[t] for t in queries for b in blocks), abs=1e-4)


def test_chunks_and_tiles_change_nothing(found: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dense, "MAX_ELEMENTS", 5000)
    for entry, other in zip(found, measured(chunk=16)["groups"], strict=True):
        for part in ("recall", "mass", "chosen", "mass_last", "shared_with"):
            assert entry[part] == pytest.approx(other[part], abs=1e-6)
        assert (entry["distinct"], entry["map"]) == (other["distinct"], other["map"])


@pytest.mark.parametrize("max_elements", [1 << 25, 3000])
def test_dense_attention(max_elements: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dense, "MAX_ELEMENTS", max_elements)
    of = LAYERS[2]
    v = torch.randn(of.k.shape, dtype=torch.float64)
    out = dense.attention(of.q[:, 100:], of.k, v, torch.arange(100, TOKENS), of.scale)
    for h in range(4):
        for t in (100, 151, TOKENS - 1):
            p = (of.k[h // 2, : t + 1] @ of.q[h, t] * of.scale).softmax(0)
            assert torch.allclose(out[t - 100, h], p @ v[h // 2, : t + 1], atol=2e-5)


def test_block_ids_in_order():
    ids = torch.tensor([[[7, 2, 5], [4, -1, -1]]])
    assert ascending(ids, 4).tolist() == [[[2, 5, 7, -1], [4, -1, -1, -1]]]
