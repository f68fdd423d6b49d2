"""How a function of tensors becomes a torch library operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("linear_moe", "FRAGMENT")


def operator(name: str, mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Make a function of annotated arguments the operator `linear_moe::name`, on CPUs (where kernels are interpreted) and GPUs.

    Straight to the dispatcher: the checks that `torch.library.custom_op` wraps around a call took 0.75 ms of each on an H100's
    host with torch 2.11, which is as long as the kernels of a step.

    Args:
        name: of the operator.
        mutates: the arguments that it writes to.
    """

    def register(function: Callable[..., Any]) -> Any:
        _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=mutates))
        for device in ("CPU", "CUDA"):
            _LIBRARY.impl(name, function, device)
        return getattr(torch.ops.linear_moe, name).default

    return register
