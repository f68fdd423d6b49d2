"""Launching a kernel without making the same decisions at every call."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime.errors import OutOfResources

TRITON_STAGES = 3
"""Of a kernel that is launched without a number of its own."""
FUSION = {"enable_fp_fusion": True}
"""Of every kernel: a product and a sum are rounded once, as in all that was measured. Unasked, releases of Triton differ in it,
and some warn of that."""

Key = tuple[object, ...]

_compiled: dict[Key, _Compiled] = {}
_recorder: _Recorder | None = None
_local = threading.local()


def launch_kernel(kernel: Any, grid: int, *arguments: Tensor | int | float | None, **options: Any) -> None:
    """`kernel[(grid,)](*arguments, **options)`; `options` are all of its constants, and launch parameters.

    Triton binds, specialises and looks up its compiled kernel in 30 microseconds of the host's time (on an H100's machine), at
    each of the ten to twenty launches of a step, whose kernels may take less. Here a third of that goes into looking it up by
    what Triton decides by: the dtype and alignment of pointers, the width and divisibility of integers, and the constants.
    """
    if _recorder is not None and _recorder.keeps_back(Launched(kernel, grid, arguments, options)):
        return
    if not hasattr(kernel, "params"):
        # The interpreter compiles nothing.
        kernel[(grid,)](*arguments, **options)
        return
    if getattr(_local, "compiling", False) and "num_warps" in options:
        compile_kernel(kernel, grid, arguments, options)
        return
    device = torch.cuda.current_device()
    key = (id(kernel), device, _specialization(arguments), tuple(options), tuple(options.values()))
    compiled = _compiled.get(key)
    if compiled is None:
        constants = [parameter.name for parameter in kernel.params if parameter.is_constexpr]
        assert [parameter.name for parameter in kernel.params[len(arguments) :]] == constants, "constants by name, last"
        # Whether it needs scratch is not known before it is compiled.
        made = _with_scratch(_launch_what_fits)(kernel, grid, arguments, options)
        # A hook of Triton's may have kept it from being compiled.
        if made is not None:
            _compiled[key] = _Compiled(made, tuple([options[name] for name in constants]))
        return
    compiled.launch(grid, device, arguments)


def compile_kernel(kernel: Any, grid: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Compile what `launch_kernel` would launch. Of tensors their dtypes will do."""
    kernel.warmup(*arguments, grid=(grid,), **options, **FUSION)


def _launch_what_fits(
    kernel: Any, grid: int, arguments: tuple[Tensor | int | float | None, ...], options: dict[str, Any]
) -> Any:
    """Triton's own launch, with fewer pipeline stages where a multiprocessor has less shared memory than they ask for.

    The launch tables are an H100's. Stages are how far ahead a kernel loads, and change no number that it makes.
    """
    while True:
        try:
            return kernel[(grid,)](*arguments, **options, **FUSION)
        except OutOfResources:
            stages = options.get("num_stages", TRITON_STAGES)
            if stages == 1:
                raise
            options = {**options, "num_stages": stages - 1}


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory of a launch, where descriptors of tensors are written that a kernel makes itself. torch gives it to what comes
    after on the same stream, or in the same captured graph.
    """
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _with_scratch(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Launches that find `_scratch`: Triton asks a context variable for it, which is empty in every new thread, as autograd's
    are, and is the caller's own outside.
    """

    def launch_in_context(*arguments: Any) -> Any:
        triton.set_allocator(_scratch)
        return launch(*arguments)

    return lambda *arguments: contextvars.copy_context().run(launch_in_context, *arguments)


class _Compiled:
    """A kernel that Triton has compiled and loaded."""

    def __init__(self, kernel: Any, constants: tuple[object, ...]) -> None:
        self.kernel, self.constants = kernel, constants
        needs_scratch = kernel.metadata.global_scratch_size > 0
        self.run = _with_scratch(kernel.run) if needs_scratch else kernel.run
        self.handles = (kernel.function, kernel.packed_metadata)

    def launch(self, grid: int, device: int, arguments: tuple[Tensor | int | float | None, ...]) -> None:
        """As `kernel[(grid, 1, 1)](...)` does, but what a profiler is told is made only where one listens."""
        runtime = knobs.runtime
        if _listens(runtime.launch_enter_hook) or _listens(runtime.launch_exit_hook):
            _with_scratch(self.kernel[(grid, 1, 1)])(*arguments, *self.constants)
            return
        stream = torch._C._cuda_getCurrentRawStream(device)
        self.run(grid, 1, 1, stream, *self.handles, None, None, None, *arguments, *self.constants)


def _listens(hook: Any) -> bool:
    """Whether something is in a chain of Triton's hooks."""
    return bool(getattr(hook, "calls", hook))


def _specialization(arguments: tuple[Tensor | int | float | None, ...]) -> tuple[object, ...]:
    """What Triton compiles a kernel for of its arguments. In line: a call of each would take as long again."""
    return tuple([
        (x.dtype, x.data_ptr() & 15 == 0)
        if isinstance(x, Tensor)
        else (x == 1, x & 15 == 0, -(2**31) <= x < 2**31)
        if isinstance(x, int)
        else x is None
        for x in arguments
    ])  # fmt: skip


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Inside, in this thread, kernels are compiled and not launched; what they would have made is anything.

    But for those without launch parameters of their own: they are small, and what they make, such as where pieces lie, is
    looked up by what comes after them.
    """
    _local.compiling = True
    try:
        yield
    finally:
        _local.compiling = False


class Launched(NamedTuple):
    """A launch of a kernel, with the tensors that it had."""

    kernel: Any
    grid: int
    arguments: tuple[Tensor | int | float | None, ...]
    options: dict[str, Any]

    def again(self) -> None:
        """Launch the same once more."""
        launch_kernel(self.kernel, self.grid, *self.arguments, **self.options)


class _Recorder(NamedTuple):
    kernel: Any
    launches: list[Launched]
    dry: bool

    def keeps_back(self, launched: Launched) -> bool:
        if launched.kernel is not self.kernel:
            return False
        self.launches.append(launched)
        return self.dry


@contextlib.contextmanager
def recorded(kernel: Any, *, dry: bool = False) -> Iterator[list[Launched]]:
    """The launches of a kernel inside, in all threads. `dry`: they are not done, and what they would have made is anything."""
    global _recorder
    assert _recorder is None, "one recording at a time"
    launches: list[Launched] = []
    _recorder = _Recorder(kernel, launches, dry)
    try:
        yield launches
    finally:
        _recorder = None
