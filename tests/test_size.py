"""``msa-backend size``: memory, arithmetic and predictions, each against numbers worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from msa_backend import cli
from msa_backend.model import sizing
from msa_backend.model.config import M3Config
from msa_backend.size import claims, compute, predict
from msa_backend.size.released import TEXT_CONFIG

from .model import configs

RELEASED = M3Config.from_text_config(TEXT_CONFIG)
MILLION = 1 << 20
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "h200-release.json"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The config of one, which is all that sizes follow from."""
    (tmp_path / "config.json").write_text(json.dumps({"text_config": configs.original()}))
    return tmp_path


def test_what_a_model_takes(checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--tensor-parallel-size", "2", "--kv-cache-dtype", "fp8", "--max-model-len", "8192"]
    assert cli.main(["size", str(checkpoint), *options, "--gpu-memory", "8"]) == 0
    shown = capsys.readouterr().out
    assert "4 layers, 3 of them sparse" in shown
    # Four layers of a K and a V head of 128 bytes each on a rank, and three index keys of 128 in bf16.
    assert "1,792 bytes a token on each rank, 1,024 of K/V and 768 of index keys" in shown
    assert '--hf-overrides \'{"text_config": {"max_position_embeddings": 8192}}\'' in shown
    assert "8,192 tokens do not fit beside the weights, about 0 do" in shown


def test_how_many_sequences_fit(capsys: pytest.CaptureFixture[str]):
    """As the table of docs/deployment.md has it: 0.51 million tokens."""
    cli.main(["size", "--tensor-parallel-size", "8", "--gpu-memory", "139.8", "--max-model-len", "128K"])
    assert "about 513,313 tokens of cache, 3 sequences of 131,072" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "config.json does not exist; pass the folder of a MiniMax-M3 checkpoint"),
        ("{", "config.json is not JSON"),
        ('{"model_type": "llama"}', "lacks num_hidden_layers"),
        (json.dumps({"quantization_config": {"quant_method": "awq"}, "text_config": configs.original()}),
         "quant_method is awq, whose size is not known here; known are mxfp8, fp8, compressed-tensors"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_model(content: str | None, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert cli.main(["size", str(tmp_path)]) == 2
    assert says in capsys.readouterr().err


def test_ranks_that_do_not_divide_the_heads(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["size", "--tensor-parallel-size", "3"]) == 2
    assert "--tensor-parallel-size is 3, but 64 query heads and 4 KV heads only split evenly" in capsys.readouterr().err


def test_a_sparse_layer_at_a_million():
    """Of 8,192 blocks 16 are read, and every index key: 4 heads of 128 beside 64."""
    layer = compute.sparse_layer(RELEASED.msa, MILLION)
    assert layer.dense == 4 * 64 * 128 * MILLION
    assert layer.selected == layer.dense // 512
    assert layer.scoring == layer.dense // 32
    assert layer.dense / layer.msa == pytest.approx(512 / 17)


def test_a_short_context_is_read_whole():
    layer = compute.sparse_layer(RELEASED.msa, 1000)
    assert layer.selected == layer.dense


def test_dense_layers_are_counted():
    whole = compute.attention(RELEASED, MILLION)
    layer = compute.sparse_layer(RELEASED.msa, MILLION)
    assert whole == (3 * layer.dense + 57 * layer.msa, 60 * layer.dense)


def test_weights_that_a_token_uses():
    """Projections, a dense or a shared MLP, four experts, router and head; not the embedding."""
    attention = 6144 * 128 * (2 * 64 + 2 * 4)
    index = 6144 * 128 * (4 + 1)
    dense, shared_and_four = 3 * 6144 * 12_288, 5 * 3 * 6144 * 3072
    by_hand = 60 * attention + 57 * (index + shared_and_four + 6144 * 128) + 3 * dense + 200_064 * 6144
    assert sizing.used_weights(RELEASED, 1) == pytest.approx(by_hand, rel=1e-4)
    # Enough tokens meet all experts.
    every = sizing.weight_bytes(RELEASED) - 2 * 200_064 * 6144
    assert sizing.used_weights(RELEASED, 10_000, form="bf16") == pytest.approx(every, rel=1e-4)
    assert sizing.used_weights(RELEASED, 1, 4) == pytest.approx(by_hand / 4, rel=2e-2)


def case(mode: str, context: int, times: dict[str, float], **changes: Any) -> dict[str, Any]:
    plain = {"batch": 1, "new_tokens": 8192 if mode == "prefill" else 1, "num_heads": 64, "num_kv_heads": 4}
    plain |= {
        "dtype": "bf16",
        "fp8_index": False,
        "fp8_kv": False,
        "locality": "calibrated",
        "bound": 0,
        "sharing": 1.0,
    }
    results = {name: {"ms": {"total": ms}} for name, ms in times.items()}
    return {"mode": mode, "context": context, "results": results} | plain | changes


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """1 PFLOP/s and 1 TB/s. What has another layout, is in fp8 or has random queries must not be read."""
    slow = {"ours": 1e6, "vllm": 1e6, "fa3": 1e6}
    cases = [
        case("prefill", 8192, {"ours": 1.0, "vllm": 2.0, "fa3": 10.0}),
        case("prefill", 24_576, {"ours": 3.0, "vllm": 6.0, "fa3": 30.0}),
        case("decode", 8192, {"ours": 0.1, "vllm": 0.2, "fa3": 1.0}, bound=8192),
        case("decode", 8192, {"ours": 0.3, "vllm": 0.4, "fa3": 2.0}, bound=MILLION),
        case("decode", 8192, slow, fp8_index=True),
        case("prefill", 8192, slow, num_heads=16, num_kv_heads=1),
        case("prefill", 16_384, slow, locality=0.0),
    ]
    ceilings = {"matmul_TFLOP_per_s": 1000.0, "read_TB_per_s": 1.0}
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"device": "A card", "ceilings": ceilings, "cases": cases}))
    return path


def test_the_first_token(measured: Path):
    """Three steps, the second halfway between two contexts that were measured."""
    found = predict.first_token(RELEASED, 1, predict.Measured(measured, RELEASED, 1), 24_576)
    of_weights = compute.weights(RELEASED) * 24_576 / 1e15
    ours, in_tree, dense = 57 * (1 + 2 + 3), 57 * (2 + 4 + 6), 3 * (10 + 20 + 30)
    assert found == {
        "ours": pytest.approx((ours + dense) / 1e3 + of_weights),
        "vllm": pytest.approx((in_tree + dense) / 1e3 + of_weights),
    }


def test_a_token(measured: Path):
    """As captured for the longest context."""
    ((context, found),) = predict.decode_steps(RELEASED, 1, predict.Measured(measured, RELEASED, 1), 1, "bf16")
    rest = 3 * 2.0 + 2 * sizing.used_weights(RELEASED, 1) / 1e12 * 1e3
    assert (context, found["ours"], found["vllm"]) == (
        8192, pytest.approx(57 * 0.3 + rest, rel=1e-3), pytest.approx(57 * 0.4 + rest, rel=1e-3)
    )  # fmt: skip


def test_nothing_is_predicted_beyond_what_was_measured(measured: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["size", "--measured", str(measured), "--lengths", "128K,8K"]) == 0
    shown = capsys.readouterr().out
    assert "Prediction, not a measurement: 60 layers on 1 x A card" in shown
    assert "first token of     8,192: ours" in shown
    assert "no first token of 131,072 tokens or more: with 64/4 heads no steps of 8,192 tokens were measured" in shown


def test_the_results_of_the_repository_are_read(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["size", "--tensor-parallel-size", "4", "--measured", str(RESULTS)]) == 0
    assert "a token,   8 at 1,048,576: ours" in capsys.readouterr().out


def test_a_file_without_measurements(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["size", "--measured", __file__]) == 2
    assert "is no result of a GPU" in capsys.readouterr().err


def test_claims_stand_apart_with_their_sources(capsys: pytest.CaptureFixture[str]):
    cli.main(["size"])
    shown = capsys.readouterr().out
    report, news = shown.split("\nClaimed by the vendor, not measured here: ")[1:]
    for block, said, other in (
        (report, claims.REPORT, claims.ANNOUNCEMENT),
        (news, claims.ANNOUNCEMENT, claims.REPORT),
    ):
        assert block.startswith(f"{said.source}, against {said.against}\n")
        assert all(sentence in block for sentence in said.sentences)
        assert not any(sentence in block for sentence in other.sentences)


def test_the_table_of_the_deployment_page():
    page = (Path(__file__).parents[1] / "docs" / "deployment.md").read_text()
    assert "\n".join(compute.table(RELEASED, [8192, 32_768, 131_072, 524_288, MILLION])) in page


def test_the_prediction_of_the_deployment_page(capsys: pytest.CaptureFixture[str]):
    page = (Path(__file__).parents[1] / "docs" / "deployment.md").read_text()
    cli.main(["size", "--tensor-parallel-size", "4", "--measured", str(RESULTS)])
    assert "a token,   8 at 1,048,576: ours 42.9 ms, in-tree 43.3 ms" in capsys.readouterr().out
    assert "at 1M takes 42.9 ms, with\nin-tree's kernels 43.3" in page
