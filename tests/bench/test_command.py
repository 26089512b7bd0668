"""`msa-backend bench` on a CPU, as a user runs it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from msa_backend import cli
from msa_backend.bench import baselines, command
from msa_backend.bench.baselines import ours
from msa_backend.bench.inputs import Inputs

QUICK = ["bench", "--device", "cpu", "--budget", "0.001"]


def test_all_modes_are_checked_timed_printed_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*QUICK, "--json", str(tmp_path / "bench.json")]) == 0
    shown = capsys.readouterr().out
    assert "without fa3: FlashAttention-3 needs a GPU" in shown
    assert "failed" not in shown and "WRONG" not in shown
    kept = json.loads((tmp_path / "bench.json").read_text())
    assert {"device", "torch", "date", "command", "ceilings"} <= kept.keys()
    assert [case["mode"] for case in kept["cases"]] == ["prefill", "suffix", "decode", "verify"]
    for case in kept["cases"]:
        assert case["results"].keys() == {"ours", "reference"}
        assert all(result["ms"]["total"] > 0 for result in case["results"].values())
        assert case["results"]["ours"]["of_ceiling"] > 0


def test_a_case_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    command_line = (
        "--contexts 1K --modes suffix --new-tokens 9 --batches 2 --heads 4/2,3/1 --head-dim 16 --topk 3 "
        "--dtype fp16 --fp8-index --fp8-kv --locality 0.9"
    )
    assert cli.main([*QUICK, *command_line.split()]) == 0
    shown = capsys.readouterr().out
    for heads in ("4/2", "3/1"):
        assert f"suffix, 9 new @ 1,024, x 2, {heads} heads, fp16, fp8 index, fp8 KV, cosine 0.9" in shown
    assert "failed" not in shown and "WRONG" not in shown


def test_decode_is_bounded_for_its_own_length_and_for_a_servers(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*QUICK, "--modes", "decode,suffix", "--capture-for", "own,64K,1K"]) == 0
    shown = capsys.readouterr().out
    rows = shown.split("total, ms")[1]
    assert rows.count("decode") == 2 and rows.count("captured for 64K") == 1 and rows.count("suffix") == 1
    assert "calibrated: four consecutive tokens" in shown
    assert "failed" not in shown and "WRONG" not in shown


def test_host_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*QUICK, "--host", "--json", str(tmp_path / "host.json")]) == 0
    shown = capsys.readouterr().out
    assert "without vllm: vLLM's kernels for MiniMax-M3 need a GPU" in shown and "failed" not in shown
    for mode in ("prefill", "suffix", "decode", "verify"):
        assert shown.count(f"\n{mode}") == 2
    kept = json.loads((tmp_path / "host.json").read_text())
    assert all(case["host_us"]["ours"]["attend"] > 0 for case in kept["cases"])
    assert [*kept["absent"]] == ["vllm"]


def test_wrong_kernels_are_not_timed_and_the_exit_status_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = ours.bind

    def wrong(inputs: Inputs, block_ids: torch.Tensor | None) -> baselines.Bound:
        bound = right(inputs, block_ids)
        return baselines.Bound(lambda: bound.attend() * 1.05, bound.select)

    monkeypatch.setattr(ours, "bind", wrong)
    assert cli.main([*QUICK, "--modes", "decode", "--run", "ours,reference"]) == 1
    shown = capsys.readouterr().out
    assert "ours       WRONG: output is off by 5.0e-02, allowed 2e-03" in shown
    assert "reference" in shown and "TB/s" not in shown.split("WRONG")[0].split("\n")[-1]


def test_a_baseline_that_fails_is_named_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(inputs: Inputs, block_ids: torch.Tensor | None) -> baselines.Bound:
        raise RuntimeError("no such\nkernel")

    monkeypatch.setattr(baselines.load("reference"), "bind", fail)
    assert cli.main([*QUICK, "--modes", "decode"]) == 0
    assert "reference  failed: RuntimeError: no such kernel" in capsys.readouterr().out


@pytest.mark.parametrize("name", baselines.NAMES)
def test_every_implementation_says_whether_it_can_run_on_a_cpu(name: str) -> None:
    reason = baselines.load(name).unavailable(torch.device("cpu"))
    assert (reason is None) == (name in ("ours", "reference"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--contexts", "8X"], "'8X' is no number of tokens; write such as 4096, 8K or 1M"),
        (["--heads", "64/5"], "'64/5' is no query heads / KV heads; write such as 64/4"),
        (["--run", "ours,flash"], "'flash' is none of ours, reference, vllm, sglang, fa3, flashinfer"),
        (["--capture-for", "1X"], "'1X' is no number of tokens"),
        (["--locality", "1"], "'1' is no locality; write calibrated, random, or a cosine from 0 to under 1"),
    ],
)
def test_arguments_that_make_no_case(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*QUICK, *arguments])
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err


def test_refusals_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "_measure", lambda *_: pytest.fail("it ran"))
    assert cli.main([*QUICK, "--json", str(tmp_path / "nowhere" / "x.json")]) == 1
    assert "there is no directory" in capsys.readouterr().err
    assert cli.main([*QUICK, "--host", "--run", "ours,sglang,fa3"]) == 1
    assert "--host measures ours and vllm; leave fa3, sglang out of --run" in capsys.readouterr().err
    assert cli.main([*QUICK, "--host", "--plot", str(tmp_path / "x.png")]) == 1
    assert "--host has nothing to plot" in capsys.readouterr().err
    assert cli.main([*QUICK, "--host", "--capture-for", "1M"]) == 1
    assert "--host calls eagerly and captures nothing; leave --capture-for out" in capsys.readouterr().err
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "matplotlib" else True)
    assert cli.main([*QUICK, "--plot", str(tmp_path / "x.png")]) == 1
    assert "--plot needs matplotlib, which is not installed; pip install matplotlib" in capsys.readouterr().err


def test_help_needs_no_torch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in sys.modules if name.startswith("msa_backend.bench")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "--help"])
    assert ended.value.code == 0
    assert "--contexts" in capsys.readouterr().out
