"""Launch Triton kernels by compiled handles that are kept, and a layer's launches by those of the layer before.

Triton's own dispatch works out at every launch which compiled form fits the arguments: 9 to 16 us of host time, more
than these kernels often run for. Here the form follows from constants and dtypes alone, and is looked up by them. And
since a step's sparse layers differ in nothing but a few tensors and scales, the launches of the first are repeated with
those of each other one in their place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import triton
from torch import Tensor

ALIGNMENT = 16
"""Bytes: where tensors begin, so that a thread loads as many at a time."""
KEEP_HANDLES = not triton.knobs.runtime.interpret
"""A test that only compiles must not launch by what it compiled."""


class Options(NamedTuple):
    """How a kernel is compiled and launched.

    Attributes:
        num_warps: of a thread block.
        num_stages: of the loads of a loop that are in flight.
        pdl: whether it may be brought up while the kernel before it still runs; see :mod:`.pdl`.
    """

    num_warps: int = 4
    num_stages: int = 3
    pdl: bool = False


class Launch(NamedTuple):
    """A kernel with all that it is launched with, its arguments in the order of its signature."""

    kernel: Kernel
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: tuple[Any, ...]
    options: Options

    def __call__(self) -> None:
        passed = self.kernel.pointers(self.arguments)
        compiled = self.kernel.compiled(self)
        if passed is not None and compiled is not None:
            x, y, z = (*self.grid, 1, 1)[:3]
            compiled[x, y, z](*passed, *self.constants)
            return
        options = {"launch_pdl": True} if self.options.pdl else {}
        compiled = self.kernel.function[self.grid](
            *self.arguments,
            *self.constants,
            num_warps=self.options.num_warps,
            num_stages=self.options.num_stages,
            **options,
        )
        if passed is not None and KEEP_HANDLES and compiled is not None:
            self.kernel.keep(self, compiled)


class Kernel:
    """A Triton kernel whose scalars and unaligned tensors are not specialised on.

    ``kernel(grid, arguments, constants, options)`` is a :class:`Launch` of it. In its signature constants come last,
    tensors are called ``*_ptr`` and tensor descriptors ``*_desc``.
    """

    def __init__(self, function: Callable[..., Any], unaligned: tuple[str, ...]) -> None:
        parameters = inspect.signature(function).parameters.values()
        names = [p.name for p in parameters if "constexpr" not in str(p.annotation)]
        scalars = [name for name in names if not name.endswith(("_ptr", "_desc"))]
        self.function = triton.jit(function, do_not_specialize=[*scalars, *unaligned])
        self._tensors = [i for i, name in enumerate(names) if name.endswith("_ptr")]
        self._descriptors = [i for i, name in enumerate(names) if name.endswith("_desc")]
        self._aligned = [i for i in self._tensors if names[i] not in unaligned]
        self._compiled: dict[Any, Any] = {}

    def __call__(
        self, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: tuple[Any, ...], options: Options
    ) -> Launch:
        return Launch(self, grid, arguments, constants, options)

    def pointers(self, arguments: Sequence[Any]) -> list[Any] | None:
        """The arguments as a compiled kernel takes them; None if a tensor begins where it must not."""
        passed = list(arguments)
        for i in self._tensors:
            passed[i] = passed[i].data_ptr()
        for i in self._descriptors:
            if isinstance(passed[i], Tensor):  # in place of a descriptor that is not used
                passed[i] = passed[i].data_ptr()
        for i in self._aligned:
            if passed[i] % ALIGNMENT:
                return None
        return passed

    def compiled(self, launch: Launch) -> Any | None:
        """What was kept of a launch like this one."""
        return self._compiled.get(self._key(launch))

    def keep(self, launch: Launch, compiled: Any) -> None:
        self._compiled[self._key(launch)] = compiled

    def _key(self, launch: Launch) -> Any:
        arguments = launch.arguments
        dtypes = [arguments[i].dtype for i in self._tensors]
        tiled = [type(arguments[i]) for i in self._descriptors]
        return arguments[self._tensors[0]].device, *dtypes, *tiled, launch.constants, launch.options


def kernel(*, unaligned: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Kernel]:
    """Make a function a :class:`Kernel`.

    Args:
        unaligned: tensors that may begin anywhere, such as slices of an engine's buffers.
    """
    return lambda function: Kernel(function, unaligned)


class Repeated:
    """The launches of a step's first layer, for every other one.

    ``repeated(layer)`` launches them with the tensors and scales of ``layer``, which stand where those of the first
    stood: of the same shapes, strides and dtypes, and as well aligned.

    Args:
        launches: of the first layer, launched already.
        layer: tensors, tensor descriptors and scales of the first layer that others replace by their own. They are
            told by identity.
    """

    def __init__(self, launches: Sequence[Launch], layer: Sequence[Any]) -> None:
        self._launches = [_Repeat(launch, layer) for launch in launches]

    def __call__(self, layer: Sequence[Any]) -> None:
        values = [x.data_ptr() if isinstance(x, Tensor) else x for x in layer]
        aligned = all(value % ALIGNMENT == 0 for value in values if isinstance(value, int))
        if not aligned or not all(launch.is_compiled for launch in self._launches):
            run([launch.on(layer) for launch in self._launches])
            return
        stream = triton.runtime.driver.active.get_current_stream(layer[0].device.index)
        for launch in self._launches:
            launch.repeat(values, stream)


class _Repeat:
    """A launch in which some arguments are replaced each time, and not held in between."""

    def __init__(self, launch: Launch, layer: Sequence[Any]) -> None:
        place = {id(x): i for i, x in enumerate(layer) if x is not None}
        self._replaced = [(at, place[id(x)]) for at, x in enumerate(launch.arguments) if id(x) in place]
        passed, compiled = launch.kernel.pointers(launch.arguments), launch.kernel.compiled(launch)
        self.is_compiled = passed is not None and compiled is not None
        if passed is not None and compiled is not None:
            self._run = compiled.run
            self._grid = (*launch.grid, 1, 1)[:3]
            # Triton's hooks are for its profiler, which would make each launch cost half as much again.
            hooks = None, None, None
            self._function = compiled.function, compiled.packed_metadata, *hooks
            self._passed = [*passed, *launch.constants]
        self._launch = self.on([None] * len(layer), launch)

    def on(self, layer: Sequence[Any], launch: Launch | None = None) -> Launch:
        """The launch with a layer's tensors and scales."""
        launch = launch or self._launch
        arguments = list(launch.arguments)
        for at, i in self._replaced:
            arguments[at] = layer[i]
        return launch._replace(arguments=tuple(arguments))

    def repeat(self, values: Sequence[Any], stream: Any) -> None:
        """Launch with a layer's pointers, descriptors and scales."""
        passed = self._passed
        for at, i in self._replaced:
            passed[at] = values[i]
        self._run(*self._grid, stream, *self._function, *passed)


def run(launches: Sequence[Launch]) -> None:
    """Launch them in their order."""
    for launch in launches:
        launch()
