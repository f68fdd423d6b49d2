"""Compiling many variants of a kernel at once.

In threads: nearly all of a compilation is native code or another program, which leave the interpreter free (eight variants of a
delta rule's walk took 7.7 s in one thread and 4.2 s in two, on two cores). What they compile lies in triton's own caches, where
the launches find it; processes would each need the GPU and half a minute of imports for the same.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from linear_moe.kernels.launch import Launched, compile_kernel

MOST_THREADS = 16


class Variant(NamedTuple):
    """What a launch is compiled for: of its tensors the dtypes alone, so that it keeps no memory."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, launched: Launched) -> Variant:
        """That of a launch."""
        plain = tuple(x.dtype if isinstance(x, Tensor) else x for x in launched.arguments)
        return cls(launched.kernel, plain, tuple(launched.options.items()))


def compile_ahead(variants: Iterable[Variant], device: torch.device) -> None:
    """Compile each variant, once. What does not compile says so when it is launched."""
    # Triton compiles for the current device, which is a thread's own.
    begin = functools.partial(torch.cuda.set_device, device) if device.type == "cuda" else None
    pool = ThreadPoolExecutor(min(os.cpu_count() or 1, MOST_THREADS), initializer=begin)
    try:
        for future in [pool.submit(_compile, variant) for variant in dict.fromkeys(variants)]:
            future.exception()
    finally:
        # Ctrl-C waits for what is being compiled, not for what is not.
        pool.shutdown(cancel_futures=True)


def _compile(variant: Variant) -> None:
    compile_kernel(variant.kernel, 1, variant.arguments, dict(variant.options))
