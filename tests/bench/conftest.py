"""Makes `benchmarks/engine` and `benchmarks/gpu_check` importable as packages, as they make themselves."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
