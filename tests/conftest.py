"""What every test folder shares: how much of the machine a test may take, and the checkpoint most of them serve."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_configure() -> None:
    """Keep to one core where a test process runs beside others.

    The tensors of a tiny model are too small to share. Threads of two processes on the same cores wait for each
    other at every operation, which costs ten times what it could gain.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker:
        cores = sorted(os.sched_getaffinity(0))
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(cores[int(worker.removeprefix("gw")) % len(cores)]))


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint as MiniMax publishes: original form, fp32, several shards."""
    from msa_backend.tiny import write_tiny_checkpoint

    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "original", shards=3)
