from __future__ import annotations

from hypothesis import HealthCheck, settings

# An example takes up to a second in the reference, and machines differ: no deadline, same examples everywhere.
settings.register_profile(
    "kernels", deadline=None, derandomize=True, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("kernels")
