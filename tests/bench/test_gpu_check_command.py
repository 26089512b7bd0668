"""A check from its command line to what is kept, with small processes for the engines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from gpu_check import command, keep, parts, processes, schedule, summary
from gpu_check.host import REPOSITORY, Host
from gpu_check.job import CUT, FAILED, NOT_BEGUN, OK, Job, Outcome

FOLDER = REPOSITORY / "benchmarks" / "gpu_check"


def python(code: str, *words: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code, *words)


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Runs jobs by the command; signals are as before afterwards."""

    def run(jobs: list[Job], *words: str) -> int:
        monkeypatch.setattr(parts, "PARTS", {"vllm:all": lambda host: [job for job in jobs if job.part != "models"]})
        monkeypatch.setattr(parts.models, "jobs", lambda host: [job for job in jobs if job.part == "models"])
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            return command.main(["vllm", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), *words])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    return run


def kept(tmp_path: Path) -> dict[str, str]:
    with tarfile.open(tmp_path / "out" / "gpu-check.tar.gz") as archive:
        return {
            entry.name: archive.extractfile(entry).read().decode()  # type: ignore[union-attr]
            for entry in archive.getmembers()
            if entry.isfile()
        }


def test_what_is_kept_and_said(check: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tmp_path / "work" / "results" / "good.json"
    writes = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('{}'); print('1 passed')"
    jobs = [
        Job("good", "vllm:good", python(writes, str(result)), tail=1),
        Job("bad", "vllm:mixed", python("print('a word'); raise SystemExit('why')")),
        Job("fine", "vllm:mixed", python("print('nobody asks')")),
        Job("missing", "vllm:missing", ("no-such-program",)),
        Job("vain", "vllm:vain", python(""), after=("bad",)),
    ]
    assert check(jobs) == 1
    files = kept(tmp_path)
    assert files["good.json"] == "{}" and files["bad.log"] == "a word\nwhy\n"
    assert "no-such-program" in files["missing.log"]
    found = json.loads(files["summary.json"])
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == found
    assert found["parts"] == {
        "vllm:good": OK, "vllm:mixed": FAILED, "vllm:missing": FAILED, "vllm:vain": NOT_BEGUN,
    }  # fmt: skip
    assert found["jobs"][0]["command"][-1] == str(result) and found["device"]
    said = capsys.readouterr().out
    assert "1 passed" in said and "why" in said and "nobody asks" not in said
    assert "    bad: failed after" in said
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"gpu-check.tar.gz", "summary.json"}


def test_all_good_is_status_0(check: Callable[..., int]) -> None:
    assert check([Job("good", "vllm:good", python(""))]) == 0


def test_a_cut_job_leaves_what_it_wrote_and_no_process(
    check: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine has a session of its own, as those of `benchmarks/engine` have, and heeds no interrupt."""
    monkeypatch.setattr(schedule, "LEAST", 0.0)
    pid = tmp_path / "pid"
    engine = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"
    starts = (
        "import pathlib, subprocess, sys\n"
        "engine = subprocess.Popen([sys.executable, '-c', sys.argv[1]], start_new_session=True)\n"
        "pathlib.Path(sys.argv[2]).write_text(str(engine.pid)); print('half', flush=True); engine.wait()\n"
    )
    job = Job("long", "vllm:long", python(starts, engine, str(pid)))
    assert check([job], "--seconds", str(command.RESERVE + 4)) == 1
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["parts"] == {"vllm:long": CUT}
    assert kept(tmp_path)["long.log"].startswith("half\n")
    assert not alive(int(pid.read_text()))


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_what_outlived_its_job_is_ended(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        "one = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
        "print(one.pid, flush=True); sys.stdin.close(); time.sleep(float(sys.argv[1]))\n"
    )
    log = tmp_path / "log"
    process = processes.Process(Job("a", "p", python(code, "1")), log)
    while process.poll() is None:
        time.sleep(0.05)
    left = int(log.read_text())
    assert alive(left)
    process.kill()
    psutil.wait_procs([psutil.Process(left)] if psutil.pid_exists(left) else [], timeout=10)
    assert not alive(left)


def test_sigterm_keeps_what_there_is(tmp_path: Path) -> None:
    """As `timeout` or a host that is taken back sends it."""
    code = (
        "import sys; sys.path[:0] = sys.argv[1:2]\n"
        "from gpu_check import command, parts\n"
        "from gpu_check.job import Job\n"
        "job = Job('long', 'vllm:long', (sys.executable, '-c', 'import time; print(1, flush=True); time.sleep(600)'))\n"
        "parts.PARTS = {'vllm:long': lambda host: [job]}; parts.models.jobs = lambda host: []\n"
        "sys.exit(command.main(['vllm', '--out', sys.argv[2] + '/out', '--work', sys.argv[2] + '/work']))\n"
    )
    process = subprocess.Popen(python(code, str(FOLDER.parent), str(tmp_path)), stdout=subprocess.PIPE, text=True)
    log = tmp_path / "work" / "results" / "long.log"
    while process.poll() is None and not (log.exists() and log.read_text()):
        time.sleep(0.05)
    process.terminate()
    assert process.wait(60) == 1
    assert json.loads(kept(tmp_path)["summary.json"])["parts"] == {"vllm:long": CUT}


def test_models_of_an_earlier_run_are_taken(check: Callable[..., int], tmp_path: Path) -> None:
    count = tmp_path / "count"
    adds = "import sys; open(sys.argv[1], 'a').write('x')"
    jobs = [
        Job("model-a", "models", python(adds, str(count))),
        Job("model-b", "models", python(f"{adds}; sys.exit(1)", str(count))),
        Job("reads-a", "vllm:a", python(""), after=("model-a",)),
        Job("reads-b", "vllm:b", python(""), after=("model-b",)),
    ]
    assert check(jobs) == 1 and count.read_text() == "xx"
    assert check(jobs, "--keep-models") == 1
    assert count.read_text() == "xxx", "only what was written to the end"
    assert check(jobs) == 1 and count.read_text() == "xxxxx"


def test_the_tests_stand_beside_their_project_file(tmp_path: Path) -> None:
    host = Host(tmp_path / "work", {})
    host.results.mkdir(parents=True)
    (host.results / "old.log").touch()
    host.prepare()
    assert not list(host.results.iterdir()), "an earlier run's results are not this one's"
    assert (host.tree / "pyproject.toml").exists() and (host.tree / "tests" / "engines" / "conftest.py").exists()
    assert not {"kernels", "model", "patches"} & {path.name for path in host.tree.iterdir()}


def test_an_archive_is_whole_whenever_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "results"
    (folder / "a.logs").mkdir(parents=True)
    (folder / "a.logs" / "ours.log").write_text("one")
    archive = keep.Archive(folder, tmp_path / "gpu-check.tar.gz")
    archive.refresh()
    assert not archive.file.exists(), "not yet"
    monkeypatch.setattr(keep, "EVERY", -1.0)
    archive.refresh()
    before = archive.file.read_bytes()
    (folder / "b.log").write_text("two")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("the host went away")))
    with pytest.raises(OSError, match="went away"):
        archive.write()
    assert archive.file.read_bytes() == before
    with tarfile.open(archive.file) as content:
        assert content.extractfile("a.logs/ours.log").read() == b"one"  # type: ignore[union-attr]


def test_a_long_log_is_shown_by_its_end(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text("".join(f"{number} {'x' * 500}\n\n" for number in range(50)))
    job = Job("a", "vllm:a", ())
    said = list(summary.lines([job], {"a": Outcome(CUT, 5.0, "the time was up")}, tmp_path))
    assert said[0] == "-- a: cut after 5 s, the time was up"
    assert len(said) == 1 + summary.TAIL + 2 and said[summary.TAIL].startswith("49 x")
    assert max(map(len, said)) <= summary.WIDTH + 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["vllm"], "--out and --work are missing"),
        (["vllm:speed", "--list"], "there is no part 'vllm:speed'"),
        (["vllm", "--out", "o", "--work", "w", "--seconds", "3"], "--seconds is 3; give more than the 8"),
    ],
)
def test_what_is_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(words)
    assert said in capsys.readouterr().err


def test_runs_as_a_folder_and_lists() -> None:
    words = [sys.executable, str(FOLDER), "vllm", "sglang", "--list"]
    done = subprocess.run(words, env={"PYTHONSAFEPATH": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "vllm-serve (alone, after model-bf16-20): " in done.stdout
    assert "sglang-truth (3 at once, after model-truth): " in done.stdout
