"""patches/vllm_backend_name.py: the name of the backend in a process that has loaded no plugin yet."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import pytest


@pytest.mark.usefixtures("vllm")
def test_the_name_survives_a_spawn() -> None:
    """A spawned engine process unpickles the options before it loads plugins."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    pickled = pickle.dumps({"backend": AttentionBackendEnum["MSA"]})
    code = f"import pickle; print(pickle.loads({pickled!r})['backend'].name)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"VLLM_LOGGING_LEVEL": "WARNING"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "MSA"
