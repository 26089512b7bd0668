"""Makes `recipes/nano` importable as the package `nano`, as it makes itself."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "recipes"))
