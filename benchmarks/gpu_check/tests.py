"""The repository's tests on the GPU, from a copy beside which nothing shadows an installed package."""

from __future__ import annotations

from gpu_check.host import Host
from gpu_check.job import Job

PYTEST = ("-q", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib", "-rfE")
ENGINE_TESTS = ("test_equal", "test_bf16", "test_preemption")
ON_CUDA = {"MSA_TEST_DEVICE": "cuda"}


def kernels(host: Host) -> list[Job]:
    """Each of our kernels against its definition. What only compiles for other GPUs needs no GPU."""
    paths = ("tests/kernels", "--ignore", "tests/kernels/gpu/test_compiles.py")
    return [_job(host, "vllm", "kernels", ("-n", "4", "--dist", "load", "-m", "gpu", *paths), engines=4)]


def memcheck(host: Host) -> list[Job]:
    """Does a kernel read or write beside its tensors? With torch's memory pool it could not be seen."""
    tests = ("-x", "-m", "gpu", "tests/kernels/gpu/test_short_steps.py", "-k", "rows or groups")
    before = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9")
    return [_job(host, "vllm", "memcheck", tests, before=before, more={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})]


def suite(host: Host) -> list[Job]:
    """The engines' own tests: equality, caches, preemption, drafts."""
    return [_engines(host, "vllm", "suite", (*ENGINE_TESTS, "test_drafts"), "not alone", 3)]


def server(host: Host) -> list[Job]:
    """Servers as a user runs them."""
    return [_engines(host, "vllm", "server", ("test_server",), "alone", 1)]


def suite_sglang(host: Host) -> list[Job]:
    return [_engines(host, "sglang", "suite", ENGINE_TESTS, "not alone", 3)]


def server_sglang(host: Host) -> list[Job]:
    return [_engines(host, "sglang", "server", ("test_server",), "alone", 1)]


def _engines(host: Host, engine: str, name: str, files: tuple[str, ...], marked: str, processes: int) -> Job:
    parallel = ("-n", str(processes), "--dist", "loadfile") if processes > 1 else ()
    words = (*parallel, "-m", marked, *(f"tests/engines/{file}.py" for file in files))
    return _job(host, engine, name, words, engines=processes, more=ON_CUDA)


def _job(
    host: Host,
    engine: str,
    name: str,
    words: tuple[str, ...],
    engines: int = 1,
    before: tuple[str, ...] = (),
    more: dict[str, str] | None = None,
) -> Job:
    chosen = ("-k", host.expression) if host.expression else ()
    command = (*before, host.pythons[engine], "-m", "pytest", *PYTEST, *words, *chosen)
    environment = host.environment(engine, **more or {})
    return Job(f"{engine}-{name}", f"{engine}:{name}", command, environment, host.tree, engines=engines, tail=1)
