"""The engines that the suite can drive, and the one that is installed here."""

from __future__ import annotations

from importlib.util import find_spec

from .base import Driver
from .sglang import SGLang
from .vllm import VLLM

DRIVERS: list[Driver] = [VLLM(), SGLang()]
# Their pins conflict, so an environment has one of them.
DRIVER = next(driver for driver in DRIVERS if find_spec(driver.package))
