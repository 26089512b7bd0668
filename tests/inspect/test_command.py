"""The command on the tiny checkpoint, and what it says where there is nothing to say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from msa_backend import cli
from msa_backend.inspect.selectors import SELECTORS
from msa_backend.tiny.words import WORDS

TEXT = " ".join(WORDS[i * 11 % len(WORDS)] for i in range(900))


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """What it writes and prints of a fact in a long text."""
    folder = tmp_path_factory.mktemp("inspect")
    capture = pytest.MonkeyPatch()
    printed: list[str] = []
    with capture.context() as patch:
        patch.setattr("builtins.print", lambda *parts, file=None, end="": printed.append(" ".join(map(str, parts))))
        assert cli.main(["inspect", str(tiny), "--length", "1500", "--queries", "32", "--json", str(folder / "j")]) == 0
    return json.loads((folder / "j").read_text()), "\n".join(printed)


def test_results(run: tuple[dict[str, Any], str]):
    found, _ = run
    assert 1436 <= found["tokens"] <= 1500
    assert (found["topk"], found["block_size"], len(found["queries"])) == (4, 128, 32)
    assert [(group["layer"], group["group"]) for group in found["groups"]] == [
        (layer, group) for layer in (1, 2, 3) for group in (0, 1)
    ]
    for group in found["groups"]:
        recall = group["recall"]
        own = next(swept for swept in group["sweep"] if (swept["block_size"], swept["topk"]) == (128, 4))
        assert recall == pytest.approx({name: own[name] for name in SELECTORS}, abs=1e-6)
        assert all(0 < recall[name] <= recall["oracle"] for name in ("msa", "pooled", "window", "random"))
        assert 4 <= group["distinct"] <= 16
        assert group["chosen"]["local"] == 1
        assert len(group["map"]) == -(-found["tokens"] // 128)
        # Each query of the last rows selects four blocks.
        assert sum(group["map"][-2]) == pytest.approx(4, abs=0.01)


def test_the_fact_is_the_target(run: tuple[dict[str, Any], str]):
    found, _ = run
    begin, end = found["target"]
    assert 20 < end - begin < 60
    assert begin == pytest.approx(found["tokens"] / 2, abs=100)
    assert all(group["mass"]["target"] > 0 for group in found["groups"])


def test_tables(run: tuple[dict[str, Any], str]):
    found, printed = run
    group = found["groups"][3]
    (recall, places) = (line.split() for line in printed.splitlines() if line.startswith("    2     1 "))
    assert recall[2] == f"{100 * group['recall']['msa']:.1f}"
    assert recall[-2:] == [f"{group['distinct']:.1f}", f"{100 * group['shared_with']['3']:.1f}"]
    assert places[2:4] == [f"{100 * group[part]['first']:.1f}" for part in ("mass", "chosen")]
    assert places[-2:] == [f"{100 * group[part]['target']:.1f}" for part in ("mass_last", "chosen_last")]
    assert f"|@{' ' * (len(group['map']) - 1)}|" not in printed
    assert "\n|@@" in printed


def test_a_file_a_target_and_layers(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "text").write_text(TEXT)
    options = ["--file", str(tmp_path / "text"), "--length", "600", "--layers", "2", "--queries", "8"]
    target = " ".join(TEXT.split()[300:303])
    assert cli.main(["inspect", str(tiny), *options, "--target", target, "--topk", "2", "--block-sizes", "128"]) == 0
    printed = capsys.readouterr().out
    assert "600 tokens, 5 blocks of 128; each query selects 4" in printed
    assert "target: tokens 300 to 302, blocks 2 to 2" in printed
    assert [line.split()[:2] for line in printed.splitlines() if line.startswith("    2 ")] == 2 * [
        ["2", "0"],
        ["2", "1"],
    ]


def test_a_plot(tiny: Path, tmp_path: Path):
    pytest.importorskip("matplotlib")
    options = ["--prompt", TEXT, "--length", "600", "--queries", "8", "--plot", str(tmp_path / "map.png")]
    assert cli.main(["inspect", str(tiny), *options]) == 0
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--prompt", "too short"], "of which the first 512 select every block they see (top-k 4 of 128 tokens), so "
         "there is nothing to select; use one of 516 or more"),
        (["--prompt", TEXT, "--length", "515"], "the prompt has 515 tokens, of which the first 512"),
        (["--prompt", TEXT, "--target", "no such words"], "--target 'no such words' does not stand in the"),
        (["--prompt", TEXT, "--length", "600", "--target", TEXT[-40:]], "does not stand in the 600 tokens"),
        (["--target", "words"], "--target is a part of a text of yours"),
        (["--file", "/no/such/file"], "/no/such/file cannot be read as text"),
        (["--prompt", TEXT, "--layers", "0,1"], "layer 0 is not sparse; choose --layers from 1 to 3"),
        (["--prompt", TEXT, "--topk", "0"], "--topk has 0, but 1 blocks are forced in"),
        (["--depth", "150"], "--depth is 150, but is a percentage from 0 to 100"),
        (["--json", "/no/such/folder/j"], "/no/such/folder/j cannot be written"),
    ],
)  # fmt: skip
def test_what_cannot_be_inspected(options: list[str], says: str, tiny: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["inspect", str(tiny), *options]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.startswith("msa-backend inspect: ") and said.count("\n") == 1


@pytest.fixture
def broken(tiny: Path, tmp_path: Path) -> Path:
    """A copy to break, without weights."""
    shutil.copytree(tiny, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors*"))
    return tmp_path / "copy"


def refusal(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["inspect", str(folder), "--prompt", TEXT, "--length", "600"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert "there is no folder" in refusal(tmp_path / "none", capsys)


def test_no_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert "config.json does not exist" in refusal(tmp_path, capsys)


def test_another_model(broken: Path, capsys: pytest.CaptureFixture[str]):
    (broken / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 2}')
    assert "is a model of type llama, not MiniMax-M3" in refusal(broken, capsys)


def test_forced_first_blocks(broken: Path, capsys: pytest.CaptureFixture[str]):
    config = json.loads((broken / "config.json").read_text())
    config["text_config"]["sparse_attention_config"]["sparse_init_block"] = 1
    (broken / "config.json").write_text(json.dumps(config))
    assert "sparse_init_block is 1, but transformers forces no first blocks in" in refusal(broken, capsys)


def test_too_long_for_the_model(broken: Path, capsys: pytest.CaptureFixture[str]):
    config = json.loads((broken / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 599
    (broken / "config.json").write_text(json.dumps(config))
    assert "has 600 tokens, but the config allows 599 positions" in refusal(broken, capsys)


def test_no_weights(broken: Path, capsys: pytest.CaptureFixture[str]):
    assert "transformers cannot load" in refusal(broken, capsys)


def test_text_alone(text_only: Path, capsys: pytest.CaptureFixture[str]):
    """``transformers`` would begin to make a model of the released size."""
    assert "holds the text model alone" in refusal(text_only, capsys)


def test_no_tokenizer(broken: Path, capsys: pytest.CaptureFixture[str]):
    for path in broken.glob("tokenizer*"):
        path.unlink()
    assert "has no tokenizer that loads" in refusal(broken, capsys)


def test_missing_weights(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from safetensors.torch import load_file, save_file

    weights = {name: tensor for shard in tiny.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    del weights["language_model.model.layers.2.self_attn.index_q_proj.weight"]
    shutil.copytree(tiny, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(weights, tmp_path / "copy" / "model.safetensors", {"format": "pt"})
    assert cli.main(["inspect", str(tmp_path / "copy"), "--prompt", TEXT, "--length", "600"]) == 2
    assert "has 1 missing keys, such as" in capsys.readouterr().err


def test_a_plot_without_matplotlib(tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(
        "msa_backend.inspect.command.find_spec", lambda name: None if name == "matplotlib" else object()
    )
    assert cli.main(["inspect", str(tiny), "--plot", "map.png"]) == 2
    assert "--plot needs matplotlib, which is not installed" in capsys.readouterr().err
