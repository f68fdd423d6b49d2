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


MOST_KEPT = 128
"""Of one function's results."""


def _stream_of(device: torch.device) -> int:
    """The number of a GPU's current stream, without the object that torch's public function makes around it."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch._C._cuda_getCurrentRawStream(index)


def static(make: Callable[..., Made]) -> Callable[..., Made]:
    """Keep what a function of sizes and, last, a device returns, wherever its tensors are plain ones. They must not be written.

    They are not while a graph is traced, which owns what is made in it, or under another dispatch mode (of fake tensors). On a
    GPU what is kept is kept for a stream: what uses it comes after what made it. A captured graph takes what was made before
    the capture, on whichever stream (it begins by waiting for all of them), and replays without making it; that is then kept
    for good, for the graph knows its address alone. What was not made before is made in the graph.
    """

    @functools.lru_cache(maxsize=MOST_KEPT)
    def kept(stream: int, *arguments: Any) -> Made:
        # A tensor that is kept must serve outside of inference mode too.
        with torch.inference_mode(False), torch.no_grad():
            return make(*arguments)

    latest: dict[tuple[Any, ...], Made] = {}
    in_graphs: dict[tuple[Any, ...], Made] = {}

    @functools.wraps(make)
    def get(*arguments: Any) -> Made:
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
            return make(*arguments)
        device = arguments[-1]
        if device.type == "cpu":
            return kept(0, *arguments)
        if device.type != "cuda":
            return make(*arguments)
        if torch.cuda.is_current_stream_capturing():
            if arguments not in in_graphs:
                if arguments not in latest:
                    return make(*arguments)
                in_graphs[arguments] = latest[arguments]
            return in_graphs[arguments]
        made = latest[arguments] = kept(_stream_of(device), *arguments)
        if len(latest) > MOST_KEPT:
            latest.pop(next(iter(latest)), None)
        return made

    return get
