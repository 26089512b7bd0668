"""What each part of a check starts, with which options, and beside what."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from engine import command as engine_command
from engine import truth
from gpu_check import fleet, models, write_drafts, write_truth
from gpu_check.host import REPOSITORY, Host
from gpu_check.job import Job
from gpu_check.parts import PARTS, chosen

HOST = Host(Path("/w"), {"vllm": "python-v", "sglang": "python-s"}, {"sglang": "/site"})
TIMED = {
    "vllm:serve",
    "vllm:fleet",
    "vllm-x2:scoring",
    "vllm-x2:serve",
    "sglang:quick",
    "sglang:profile",
    "sglang:full",
}
NAME = re.compile(r"[a-z0-9-]+")


def jobs(*words: str, host: Host = HOST) -> dict[str, Job]:
    return {job.name: job for job in chosen(words, host)}


def arguments(job: Job) -> list[str]:
    """Of a job of `benchmarks/engine`."""
    assert job.command[1] == str(REPOSITORY / "benchmarks" / "engine")
    return list(job.command[2:])


ALL = jobs(*PARTS)
ENGINE_RUNS = [job for job in ALL.values() if str(REPOSITORY / "benchmarks" / "engine") in job.command]


def test_names_are_fit_for_files() -> None:
    assert all(NAME.fullmatch(name) for name in ALL)
    assert len(ALL) == sum(len(make(HOST)) for make in PARTS.values()) + len(models.jobs(HOST))
    for job in ENGINE_RUNS:
        for one in engine_command.parse(arguments(job)).__dict__.get("also", []):
            assert NAME.fullmatch(one[0])


@pytest.mark.parametrize("job", ENGINE_RUNS, ids=lambda job: job.name)
def test_the_engine_benchmark_takes_the_arguments(job: Job) -> None:
    """And no engine is timed beside another."""
    given = engine_command.parse(arguments(job))
    if given.step == "run":
        assert job.engines == given.at_once * given.options.get("tensor_parallel_size", 1) or job.timed
        assert job.timed == bool({"cells", "profile", "serve"} & set(given.only))


def test_exactly_what_is_timed_runs_alone() -> None:
    assert {job.part for job in ALL.values() if job.timed} == TIMED


def test_every_engine_leaves_the_others_room() -> None:
    for job in ENGINE_RUNS:
        given = engine_command.parse(arguments(job))
        if given.step != "run":
            continue
        if given.engine == "vllm":
            # vLLM compares the share with what is free even where the size is given.
            assert given.options["gpu_memory_utilization"] == 0.02 and given.options["kv_cache_memory_bytes"] > 0
        elif not job.timed:
            assert given.options["max_total_tokens"] > 0
    for job in fleet.parts(HOST):
        options = json.loads(job.command[-1])
        assert options["gpu_memory_utilization"] == 0.02 and options["kv_cache_memory_bytes"] > 0


def test_models_come_first_and_each_once() -> None:
    found = list(jobs("vllm:caches", "vllm:mtp", "vllm:eagle3", "vllm:fleet-parts").values())
    assert [job.name for job in found if job.part == "models"] == ["model-bf16", "model-drafts", "model-mxfp8"]
    assert all(job.part == "models" for job in found[:3])
    for job in ALL.values():
        written = {name for name in job.after for part in [ALL[name]] if part.part == "models"}
        assert written == set(job.after)


@pytest.mark.parametrize("job", ALL.values(), ids=lambda job: job.name)
def test_what_a_job_reads_was_written_before(job: Job) -> None:
    """Every path of a model in its command is one that a job it waits for writes."""
    if job.part == "models":
        return
    read = set(re.findall(r"/w/models/[\w-]+", " ".join(job.command)))
    by_others = {path for name in job.after for path in re.findall(r"/w/models/[\w-]+", " ".join(ALL[name].command))}
    assert read <= by_others


def test_each_engine_has_its_interpreter_and_path() -> None:
    for job in ALL.values():
        engine = "sglang" if "sglang" in job.name or job.name == "model-truth" else "vllm"
        assert HOST.pythons[engine] in job.command
        assert job.environment.get("PYTHONPATH") == HOST.paths.get(engine)
        assert job.environment["PYTHONSAFEPATH"] == job.environment["MSA_ALLOW_UNTESTED"] == "1"


def test_caches_are_fp8_each_and_both() -> None:
    given = engine_command.parse(arguments(jobs("vllm:caches")["vllm-caches"]))
    options = {name: engine_command.options_of(one, given) for _, name, one, _ in engine_command.jobs(given)}
    kept = {
        name: (one["kv_cache_dtype"], one["attention_config"].get("indexer_kv_dtype", "as K"))
        for name, one in options.items()
    }
    assert kept == {
        "ours": ("fp8", "fp8"),
        "in-tree": ("fp8", "fp8"),
        "bf16": ("auto", "as K"),
        "in-tree-bf16": ("auto", "as K"),
        "kv-only": ("fp8", "as K"),
        "index-only": ("auto", "fp8"),
        "eager": ("fp8", "fp8"),
    }


def test_drafts_beside_none() -> None:
    def drafts(part: str) -> dict[str, tuple[str, int] | None]:
        given = engine_command.parse(arguments(jobs(f"vllm:{part}")[f"vllm-{part}"]))
        asked = {name: engine_command.options_of(one, given) for _, name, one, _ in engine_command.jobs(given)}
        return {
            name: (one["method"], one["num_speculative_tokens"]) if (one := options["speculative_config"]) else None
            for name, options in asked.items()
        }

    assert drafts("mtp") == {
        "ours": ("mtp", 3), "no-drafts": None, "n-gram": ("ngram", 3), "mtp-7": ("mtp", 7), "eager": ("mtp", 3),
    }  # fmt: skip
    three = ("eagle3", 3)
    assert drafts("eagle3") == {"ours": three, "in-tree": three, "no-drafts": None, "eager": three}


def test_the_published_command() -> None:
    """The fleets' flags, at one rank and with a model of ours."""
    given = engine_command.parse(arguments(jobs("vllm:fleet")["vllm-fleet"]))
    assert given.classes == ("ours", "in-tree")
    drafts = given.options.pop("speculative_config")
    assert Path(drafts.pop("model")).name == "draft-20"
    assert drafts == {
        "method": "eagle3", "num_speculative_tokens": 3, "attention_backend": "FLASH_ATTN",
        "rejection_sample_method": "synthetic", "synthetic_acceptance_length": 2.78,
    }  # fmt: skip
    assert given.options == {
        "kv_cache_dtype": "fp8", "block_size": 128, "enable_prefix_caching": True, "enable_prompt_tokens_details": True,
        "default_chat_template_kwargs": {"thinking_mode": "enabled"}, "max_num_seqs": 20,
        "max_cudagraph_capture_size": 80, "tool_call_parser": "minimax_m3", "reasoning_parser": "minimax_m3",
        "enable_auto_tool_choice": True, "gpu_memory_utilization": 0.02, "kv_cache_memory_bytes": 10_000_000_000,
    }  # fmt: skip


def test_the_published_command_taken_apart() -> None:
    found = {job.name.removeprefix("vllm-fleet-"): job for job in fleet.parts(HOST)}
    assert len(found) == 2 * len(fleet.SUBSETS)
    for name, job in found.items():
        options, eager = json.loads(job.command[-1]), name.endswith("-eager")
        drafts = options.get("speculative_config", {})
        assert ("mxfp8" in name) == options["model"].endswith("mxfp8")
        assert ("-kv-" in f"-{name}") == (options.get("kv_cache_dtype") == "fp8")
        assert ("eagle3" in name) == bool(drafts)
        assert ("synthetic" in name) == ("rejection_sample_method" in drafts)
        # Only one kernel at a time names the one that failed, and graphs do not run so.
        assert eager == options.get("enforce_eager", False) == (job.environment.get("CUDA_LAUNCH_BLOCKING") == "1")
        assert set(job.after) == {"model-bf16", "model-mxfp8"} if "mxfp8" in name else job.after == ("model-bf16",)
    everything = json.loads(found["mxfp8-kv-eagle3-synthetic-graphs"].command[-1])
    whole = engine_command.parse(arguments(jobs("vllm:fleet")["vllm-fleet"])).options
    for option in ("kv_cache_dtype", "max_num_seqs", "max_cudagraph_capture_size", "block_size"):
        assert everything[option] == whole[option]


def test_two_ranks_beside_one() -> None:
    given = engine_command.parse(arguments(jobs("vllm-x2:ranks")["vllm-x2-ranks"]))
    asked = {name: (one, engine_command.options_of(one, given)) for _, name, one, _ in engine_command.jobs(given)}
    assert {name: options["tensor_parallel_size"] for name, (_, options) in asked.items()} == {
        "ours": 2, "in-tree": 2, "one-rank": 1, "shared": 2, "fp8-caches": 2, "eager": 2,
    }  # fmt: skip
    assert [name for name, (one, _) in asked.items() if "MSA_SHARED_SCORING" in one.environment] == ["shared"]
    assert not any("environment" in options for _, options in asked.values())
    ways = {name: json.loads(job.command[-1]) for name, job in jobs("vllm-x2:other-ways").items() if "x2" in name}
    assert ways["vllm-x2-experts"]["enable_expert_parallel"] and ways["vllm-x2-stages"]["pipeline_parallel_size"] == 2


def test_one_gpu_is_not_asked_for_what_needs_two() -> None:
    assert not any("x2" in name for name in jobs("vllm"))
    assert {"vllm-x2-ranks", "vllm-x2-scoring", "vllm-x2-serve", "vllm-x2-fleet"} <= set(jobs("vllm-x2"))
    fleet_of_two = engine_command.parse(arguments(jobs("vllm-x2:serve")["vllm-x2-fleet"])).options
    assert fleet_of_two.pop("tensor_parallel_size") == 2
    assert fleet_of_two == engine_command.parse(arguments(jobs("vllm:fleet")["vllm-fleet"])).options


def test_tests_run_in_the_copy_on_the_gpu() -> None:
    of_engines = ("vllm-suite", "vllm-server", "sglang-suite", "sglang-server")
    for name in ("vllm-kernels", "vllm-memcheck", *of_engines):
        job = ALL[name]
        assert job.folder == Path("/w/tree") and "pytest" in job.command
        assert job.environment.get("MSA_TEST_DEVICE") == ("cuda" if name in of_engines else None)
        files = [word for word in job.command if word.startswith("tests/")]
        assert files and all((REPOSITORY / file).exists() for file in files)
    assert ALL["vllm-memcheck"].command[0] == "compute-sanitizer"
    assert ALL["vllm-memcheck"].environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"


def test_some_of_the_tests() -> None:
    host = Host(HOST.work, HOST.pythons, expression="test_alone or rows")
    for name in ("vllm:suite", "vllm:memcheck", "sglang:suite"):
        (job,) = jobs(name, host=host).values()
        assert job.command[-2:] == ("-k", "test_alone or rows"), "pytest heeds the last"


def test_a_truth_from_elsewhere_is_not_written_again() -> None:
    elsewhere = Host(HOST.work, HOST.pythons, truth=Path("/t"))
    (job,) = jobs("sglang:truth", host=elsewhere).values()
    assert {"/t/tiny", "/t/truth.json"} <= set(job.command)


def test_engines_parts_and_jobs_can_be_named() -> None:
    assert {job.part.partition(":")[0] for job in jobs("sglang").values()} == {"sglang", "models"}
    assert list(jobs("sglang-full-ours")) == ["model-sglang", "sglang-full-ours"]
    assert "vllm-mtp" in jobs("vllm:mtp")
    with pytest.raises(ValueError, match="no part 'vllm:speed'; take vllm, vllm-x2 .two GPUs., sglang or some of"):
        chosen(["vllm:speed"], HOST)


def test_drafts_are_those_of_the_tests(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    write_drafts.main(tmp_path / "drafts")
    assert {folder.name for folder in (tmp_path / "drafts").iterdir()} == {"mtp", "eagle3", "eagle3-draft"}
    config = json.loads((tmp_path / "drafts" / "eagle3-draft" / "config.json").read_text())
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == write_drafts.TAPS


def test_the_truth_is_about_a_model_that_both_classes_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    asked: list[tuple[Path, Path]] = []
    monkeypatch.setattr(truth, "write", lambda *paths: asked.append(paths))
    write_truth.main(tmp_path)
    assert asked == [(tmp_path / "tiny", tmp_path / "truth.json")]
    config = json.loads((tmp_path / "tiny" / "config.json").read_text())
    assert "vision_segment_max_frames" in config["vision_config"], "SGLang's own class asks for it"
    assert config["torch_dtype"] == "bfloat16"
