"""What an operator's first call would compile kernel by kernel, compiled side by side.

Triton compiles a kernel when it is first launched, one after another. So before the first call of its kind both passes are
gone through once with nothing but compilation in place of the launches, in threads: most of it is LLVM and ptxas, which need
no Python, and the C compiler, by which some releases of Triton make a launcher of each kernel.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import triton

from linear_moe.kernels.launch import compiling

MOST_THREADS = 8

_seen: set[Hashable] = set()


def compile_ahead(device: torch.device, key: Hashable, passes: Callable[[], object]) -> None:
    """Compile what `passes` would launch, if nothing with this `key` has been yet. What it makes is thrown away.

    On a CPU nothing is compiled; in the midst of a graph's capture nothing may be.
    """
    if device.type != "cuda" or (device, key) in _seen:
        return
    if torch.cuda.is_current_stream_capturing():
        return
    _seen.add((device, key))
    with contextlib.suppress(torch.OutOfMemoryError), _side_by_side(device):
        passes()


@contextlib.contextmanager
def _side_by_side(device: torch.device) -> Iterator[None]:
    """Launches inside are compilations, done when it is left. One that fails is left to the launch itself to report."""
    threads = min(MOST_THREADS, os.cpu_count() or 1)
    # Kernels are loaded for the current device, which is a thread's own.
    pool = ThreadPoolExecutor(threads, initializer=torch.cuda.set_device, initargs=(device,))
    with pool, triton.AsyncCompileMode(_Loading(pool), ignore_errors=True), compiling():
        yield


class _Loading(NamedTuple):
    """An executor of compilations, whose kernels it makes ready to be launched too."""

    pool: ThreadPoolExecutor

    def submit(self, compilation: Callable[[], Any]) -> Future[Any]:
        return self.pool.submit(_loaded, compilation)


def _loaded(compilation: Callable[[], Any]) -> Any:
    kernel = compilation()
    # Asked for what launches it, a kernel makes that and is loaded.
    _ = kernel.run
    return kernel
