"""Activation checkpointing: a block's inner tensors are computed again in the backward pass instead of being kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from linear_moe.layers.auxiliary import keep_collected


def checkpoint_without_reentry(function: Callable[..., Tensor], x: Tensor) -> Tensor:
    """Torch's checkpoint of `function(x)`, not reentrant: what a layer computes beside its output keeps its gradient, too."""
    output: Tensor = checkpoint(function, x, use_reentrant=False)
    return output


def run_checkpointed(
    module: nn.Module, forward: Callable[..., Tensor], run: Callable[..., Tensor], x: Tensor, **options: Any
) -> Tensor:
    """`forward(x, **options)` of `module` through `run`, a checkpoint that is not reentrant.

    An auxiliary loss is attached or collected by the first pass alone: attached, the second pass's copy is in a graph that
    nothing goes back through; collected, it is taken back here.
    """
    again = False

    def once_or_again(x: Tensor) -> Tensor:
        nonlocal again
        if again:
            with keep_collected(module):
                return forward(x, **options)
        again = True
        return forward(x, **options)

    return run(once_or_again, x)
