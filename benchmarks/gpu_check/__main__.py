"""`python benchmarks/gpu_check`: see command.py."""

import sys
from pathlib import Path

# A folder that is run becomes the first place to import from; as a package its files keep their full names.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from gpu_check.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
