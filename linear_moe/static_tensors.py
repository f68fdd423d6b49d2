"""Tensors that sizes alone decide, made once.

A row of positions, a batch's borders: each costs a launch or several, at every call, to say what was said before. This module
is a leaf: kernels, rules and layers import it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Made = TypeVar("Made")


def static(make: Callable[..., Made]) -> Callable[..., Made]:
    """Keep what a function of sizes and, last, a device returns, wherever its tensors are plain ones. They must not be written.

    They are not while a graph is traced or captured, which own what is made in them, or under another dispatch mode (of fake
    tensors). On a GPU what is kept is kept for a stream: what uses it comes after what made it.
    """

    @functools.lru_cache(maxsize=128)
    def kept(stream: int, *arguments: Any) -> Made:
        # A tensor that is kept must serve outside of inference mode too.
        with torch.inference_mode(False), torch.no_grad():
            return make(*arguments)

    @functools.wraps(make)
    def get(*arguments: Any) -> Made:
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
            return make(*arguments)
        device = arguments[-1]
        if device.type == "cpu":
            return kept(0, *arguments)
        if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return make(*arguments)
        return kept(torch.cuda.current_stream(device).cuda_stream, *arguments)

    return get
