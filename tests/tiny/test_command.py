"""`msa-backend tiny`: what it writes, and that every refusal is one sentence."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from msa_backend.model.config import M3Config
from msa_backend.model.mtp import expected_mtp_shapes
from msa_backend.tiny import TinyCheckpointError, TinyShape, add_parser, write_tiny_checkpoint


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["tiny", *arguments])
    return args.run(args)


def test_writes_and_says_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "new" / "m3"
    assert run(str(directory), "--dtype", "bfloat16", "--shards", "2", "--seed", "3") == 0
    assert "random weights" in capsys.readouterr().out
    assert "gibberish" in (directory / "README.md").read_text()
    assert sum(file.stat().st_size for file in directory.iterdir()) < 40e6
    assert len({file.stat().st_mode for file in directory.iterdir()}) == 1


def test_mtp_modules_come_beside_the_same_weights(tmp_path: Path) -> None:
    for modules in (0, 2):
        assert run(str(tmp_path / str(modules)), "--mtp-modules", str(modules)) == 0
    without, weights = (load_file(tmp_path / name / "model.safetensors") for name in ("0", "2"))
    config = json.loads((tmp_path / "2" / "config.json").read_text())["text_config"]
    shapes = expected_mtp_shapes(M3Config.from_text_config(config), config["num_mtp_modules"])
    found = {
        name.removeprefix("language_model."): tuple(weights[name].shape) for name in weights.keys() - without.keys()
    }
    assert found == shapes
    assert config["num_mtp_modules"] == 2
    assert all(torch.equal(weights[name], tensor) for name, tensor in without.items())


def test_refuses_a_directory_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert run(str(tmp_path)) == 1
    message = capsys.readouterr().err
    assert message == f"msa-backend tiny: {tmp_path} is not empty; choose another directory or pass --overwrite\n"
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]
    assert run(str(tmp_path), "--overwrite") == 0
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"form": "gguf"}, "must be one of original, transformers, transformers-default"),
        ({"dtype": "int4"}, "must be one of float32, bfloat16"),
        ({"shards": 0}, "shards start at 1"),
        ({"shards": 5000}, "5000 shards are more than the"),
        ({"seed": -1}, "seeds at 0"),
        ({"shape": TinyShape(mtp_modules=-1)}, "modules start at 0"),
        ({"shape": TinyShape(mtp_modules=1), "form": "transformers"}, "transformers saves none; choose the original"),
    ],
)
def test_refuses_arguments(arguments: dict[str, object], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(TinyCheckpointError, match=sentence):
        write_tiny_checkpoint(tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TinyCheckpointError, match="is a file"):
        write_tiny_checkpoint(tmp_path / "file", overwrite=True)


def test_needs_transformers_for_its_forms_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(TinyCheckpointError, match="needs transformers 5.19 or newer, which is not installed"):
        write_tiny_checkpoint(tmp_path / "new", form="transformers")
    write_tiny_checkpoint(tmp_path / "new")


def test_names_a_transformers_that_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = types.ModuleType("transformers")
    old.__version__ = "4.57.0"
    monkeypatch.setitem(sys.modules, "transformers", old)
    with pytest.raises(TinyCheckpointError, match="but 4.57.0 is installed and has no MiniMax-M3"):
        write_tiny_checkpoint(tmp_path / "new", form="transformers")


def test_names_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = "msa_backend.tiny.checkpoint.importlib.util.find_spec"
    monkeypatch.setattr(found, lambda name: None if name == "tokenizers" else object())
    with pytest.raises(TinyCheckpointError, match="needs tokenizers, which is not installed"):
        write_tiny_checkpoint(tmp_path / "new")


def test_importing_loads_nothing_heavy() -> None:
    code = "import sys, msa_backend.tiny; print(*sys.modules)"
    loaded = set(subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert not loaded & {"torch", "transformers", "tokenizers", "safetensors"}
