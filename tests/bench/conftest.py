"""Makes `benchmarks/engine` importable as the package `engine`, as it makes itself."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
