from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

from .implementations import INTERPRETED, ON_CUDA

# An example takes up to a second in the reference, and machines differ: no deadline. Without a GPU the examples are
# the same everywhere; on one they are new in every run, and a failure prints the call that repeats it.
settings.register_profile(
    "kernels",
    deadline=None,
    derandomize=not ON_CUDA,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("kernels")

if INTERPRETED:
    from .interpreter import hasten

    hasten()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not (ON_CUDA or INTERPRETED):
        skip = pytest.mark.skip(reason="needs a CUDA device, or TRITON_INTERPRET=1 and some patience")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
