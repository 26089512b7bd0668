"""Which test processes run what where there are several, and in which order."""

from __future__ import annotations

from typing import Any

# The tests of each ask one server, so that one is started for all of them.
TOGETHER = ("tests/vllm/api/", "tests/sglang/api/")
# What takes longest, longest first: whatever is left for the end is then short, and all processes end at about the
# same time. The others follow in their own order.
LONGEST = (
    "tests/kernels/gpu/test_compiles.py",
    "tests/engines/test_equal.py",
    *TOGETHER,
    "tests/kernels/gpu/test_warm_up_without_gpu.py",
    "tests/vllm/test_mtp.py",
    "tests/vllm/test_images.py",
    "tests/vllm/test_connectors.py",
    "tests/vllm/test_image_server.py",
    "tests/engines/test_preemption.py",
    "tests/engines/test_ranks.py",
    # In Triton's interpreter, a run of its own.
    "tests/kernels/test_attend.py",
    "tests/kernels/gpu/test_short_steps.py",
    "tests/kernels/gpu/test_pieces.py",
    "tests/kernels/gpu/test_topk.py",
)


def place(nodeid: str) -> int:
    """Where a test's file stands among the longest; behind them all if it is none."""
    return next((at for at, start in enumerate(LONGEST) if nodeid.startswith(start)), len(LONGEST))


def scheduler(config: Any, log: Any) -> Any:
    """xdist's of ``--dist loadfile``, for which the files that ask one server are one."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduler(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            together = (folder for folder in TOGETHER if nodeid.startswith(folder))
            return next(together, None) or super()._split_scope(nodeid)

    return Scheduler(config, log)
