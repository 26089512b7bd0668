"""`python benchmarks/engine`: see command.py."""

import sys
from pathlib import Path

# A folder that is run becomes the first place to import from, and `profile` would shadow Python's. As the package
# `engine` the same files can also be named to the engine's own processes.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from engine.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
