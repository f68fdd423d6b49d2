"""Activation checkpointing: a block's inner tensors are computed again in the backward pass instead of being kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from linear_moe.layers.auxiliary import keep_collected

Pair = tuple[Tensor, Tensor]
"""Of what a block returns."""


def checkpoint_without_reentry(function: Callable[..., Pair], *inputs: Tensor | None) -> Pair:
    """Torch's checkpoint of a function, not reentrant: what a layer computes beside its output keeps its gradient, too."""
    output: Pair = checkpoint(function, *inputs, use_reentrant=False)
    return output


def run_checkpointed(
    module: nn.Module,
    forward: Callable[..., Pair],
    run: Callable[..., Pair],
    *inputs: Tensor | None,
    **options: Any,
) -> Pair:
    """`forward(*inputs, **options)` of `module` through `run`, a checkpoint that is not reentrant.

    An auxiliary loss is attached or collected by the first pass alone: attached, the second pass's copy is in a graph that
    nothing goes back through; collected, it is taken back here.
    """
    again = False

    def once_or_again(*inputs: Tensor | None) -> Pair:
        nonlocal again
        if again:
            with keep_collected(module):
                return forward(*inputs, **options)
        again = True
        return forward(*inputs, **options)

    return run(once_or_again, *inputs)
