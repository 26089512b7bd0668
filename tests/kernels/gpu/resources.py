"""Compile kernels for GPUs that are not there, exactly as their Python wrappers launch them, and say what they use.

    PYTHONSAFEPATH=1 python tests/kernels/gpu/resources.py FILE.py:FUNCTION ... [--arch 90 80 89] [--keep DIR]
    PYTHONSAFEPATH=1 python tests/kernels/gpu/resources.py tests/kernels/gpu/launches.py:decode

FUNCTION takes no arguments and calls any Python code that launches Triton kernels. It is run once for each
architecture with torch's default device set to ``meta``: ``torch.empty(8192, 64, 128, dtype=torch.bfloat16)`` costs
nothing and has no values, so a wrapper that reads one back fails here, as it would stall a CUDA graph. Nothing is
launched. One line is printed for each kernel and set of compile-time constants. ``--keep DIR`` writes the PTX and the
machine code (``cuobjdump -sass`` lists it).

Wrappers must ask for the GPU through ``arch.capability`` and ``arch.num_sms`` alone, without keeping the answer.
A kernel's time is not estimated; what is read here: registers, stack (which in Triton is spilled registers), shared
memory, thread blocks that fit on one SM at once, and which tensor-core instructions the loops were given.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.errors import CompilationError
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from msa_backend.kernels.gpu import arch
from msa_backend.kernels.gpu import launch as launch_module


@dataclass(frozen=True)
class GPU:
    """Of an architecture: what bounds a kernel there."""

    name: str
    num_sms: int
    shared_per_block: int
    """The most shared memory that one thread block may ask for, in bytes."""
    shared_per_sm: int
    threads_per_sm: int
    registers_per_sm: int = 65536


GPUS = {
    80: GPU("A100", 108, 163 * 1024, 164 * 1024, 2048),
    89: GPU("L40S", 142, 99 * 1024, 100 * 1024, 1536),
    90: GPU("H200", 132, 227 * 1024, 228 * 1024, 2048),
}
RESERVED_SHARED = 1024  # of each thread block, by the driver


@dataclass(frozen=True, eq=False)
class Compiled:
    """One kernel with one set of compile-time constants, for one architecture."""

    arch: int
    kernel: Any

    @property
    def name(self) -> str:
        return self.kernel.name

    @property
    def constants(self) -> dict[str, Any]:
        names = self.kernel.src.fn.arg_names
        return {names[path[0]]: value for path, value in self.kernel.src.constants.items()}

    @property
    def num_warps(self) -> int:
        return self.kernel.metadata.num_warps

    @property
    def shared(self) -> int:
        return self.kernel.metadata.shared

    @cached_property
    def _usage(self) -> dict[str, int]:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.kernel.asm["cubin"])
            file.flush()
            tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
            text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}

    @property
    def registers(self) -> int:
        return self._usage["REG"]

    @property
    def stack(self) -> int:
        """Bytes of local memory a thread uses: its spilled registers."""
        return self._usage["STACK"] + self._usage["LOCAL"]

    @property
    def blocks_per_sm(self) -> int:
        gpu, threads = GPUS[self.arch], 32 * self.num_warps
        registers = -(-self.registers // 8) * 8 * threads  # allocated 8 to a thread at a time
        by_shared = gpu.shared_per_sm // (self.shared + RESERVED_SHARED)
        return min(gpu.registers_per_sm // registers, gpu.threads_per_sm // threads, by_shared)

    def count(self, instruction: str) -> int:
        """How often an instruction such as ``wgmma.mma_async`` occurs in the PTX."""
        return len(re.findall(rf"\b{re.escape(instruction)}\b", self.kernel.asm["ptx"]))


class _AbsentDriver:
    """Stands where Triton asks which GPU it compiles for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 1000 + self.capability  # kernels are cached by device: kept apart from those of a real one

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@dataclass(frozen=True)
class Launches:
    """What was compiled, once for each set of constants, and what did not."""

    compiled: list[Compiled]
    failed: list[str]


@contextmanager
def compile_only(capability: int, each: Callable[[Compiled], None] | None = None) -> Iterator[Launches]:
    """Inside, launching a kernel compiles it for SM ``capability`` and does nothing else."""
    launches = Launches([], [])
    seen: set[int] = set()
    launch = JITFunction.run

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        try:
            kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        except (CompilationError, RuntimeError) as error:
            first = error
            while first.__context__ is not None:
                first = first.__context__
            message = f"SM{capability} {self.fn.__name__}: {error} {first}"
            if message not in launches.failed:
                launches.failed.append(message)
            return None
        if id(kernel) not in seen:
            seen.add(id(kernel))
            launches.compiled.append(Compiled(capability, kernel))
            if each:
                each(launches.compiled[-1])
        return kernel

    with (
        mock.patch.object(driver, "_active", _AbsentDriver(capability)),
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(launch_module, "KEEP_HANDLES", False),
        mock.patch.object(arch, "capability", lambda device: divmod(capability, 10)),
        mock.patch.object(arch, "num_sms", lambda device: GPUS[capability].num_sms),
        torch.device("meta"),
    ):
        yield launches


COLUMNS = "{:>4} {:>6} {:>6} {:>9} {:>6} {:>9} {:>6} {:>5}  {}"


def line(c: Compiled) -> str:
    constants = " ".join(f"{name}={value}" for name, value in c.constants.items() if value is not None)
    stages = getattr(c.kernel.metadata, "num_stages", "")
    return COLUMNS.format(
        c.arch, c.registers, c.stack, c.shared, f"{c.num_warps}/{stages}", c.blocks_per_sm,
        c.count("wgmma.mma_async") or "-", c.count("mma.sync") or "-",
        f"{c.name}  {constants}",
    )  # fmt: skip


def load(place: str) -> Callable[[], None]:
    path, _, function = place.rpartition(":")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None, f"{path} is not a Python file"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, function)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("launches", nargs="+", metavar="FILE.py:FUNCTION")
    parser.add_argument("--arch", type=int, nargs="+", default=[90], choices=sorted(GPUS))
    parser.add_argument("--keep", type=Path, metavar="DIR")
    arguments = parser.parse_args()
    functions = [load(place) for place in arguments.launches]
    print(COLUMNS.format("SM", "regs", "stack", "shared", "w/st", "blocks/SM", "wgmma", "mma", "kernel and constants"))
    for capability in arguments.arch:
        with compile_only(capability, lambda c: print(line(c), flush=True)) as launches:
            for function in functions:
                function()
        for failure in launches.failed:
            print(failure)
        for i, c in enumerate(launches.compiled if arguments.keep else []):
            arguments.keep.mkdir(parents=True, exist_ok=True)
            stem = arguments.keep / f"sm{capability}-{i}-{c.name}"
            stem.with_suffix(".ptx").write_text(c.kernel.asm["ptx"])
            stem.with_suffix(".cubin").write_bytes(c.kernel.asm["cubin"])


if __name__ == "__main__":
    main()
