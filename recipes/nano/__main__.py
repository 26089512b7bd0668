"""``python recipes/nano``, from anywhere."""

import sys
from importlib import import_module
from pathlib import Path

# Started by its path the folder is no package. The repository's root stays off the path, where kernels/ would be taken
# for a package of that name that other projects look for.
sys.path[0] = str(Path(__file__).resolve().parent.parent)
sys.exit(import_module("nano.command").main())
