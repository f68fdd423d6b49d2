"""Auxiliary losses: how a router's balance and z-loss reach the optimiser, and the one home of their scale.

A loss is either *attached*: its gradient joins the output's in autograd and any training loop works unchanged; or
*collected*: the user adds `collect_auxiliary_losses(model)` to the loss. Scaling the main loss (mixed precision, gradient
accumulation) scales a collected loss with it, but can't reach an attached one: `set_auxiliary_scale(model, factor)` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from linear_moe.layers.precision import KeepsFloat32

AUXILIARY_MODES = ("attach", "collect")


class _Attach(torch.autograd.Function):
    """Identity on `output`; in the backward pass the loss receives the gradient `scale`."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.loss_dtype = loss.dtype
        # The same numbers, and no view of them to autograd: what a sharded block returns should be none.
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (scale,) = ctx.saved_tensors
        return gradients[0], scale.to(ctx.loss_dtype), None


class AuxiliaryLoss(KeepsFloat32):
    """Where a layer hands in its auxiliary loss.

    Args:
        mode: "attach" or "collect".

    Raises:
        ValueError: if the mode is another.
    """

    scale: Tensor

    def __init__(self, mode: str = "attach") -> None:
        super().__init__()
        if mode not in AUXILIARY_MODES:
            raise ValueError(f"auxiliary must be one of {', '.join(AUXILIARY_MODES)}, got {mode!r}")
        self.mode = mode
        self.collected: Tensor | None = None
        # A tensor, so that a captured graph sees it change.
        self.register_buffer("scale", torch.ones((), dtype=torch.float32), persistent=False)

    def forward(self, output: Tensor, loss: Tensor) -> Tensor:
        """`output`, with the scalar `loss` attached to it or kept in `collected`; out of training neither."""
        self.collected = None
        if not (self.training and torch.is_grad_enabled() and loss.requires_grad):
            return output
        if self.mode == "collect":
            self.collected = loss
            return output
        attached: Tensor = _Attach.apply(output, loss, self.scale)
        return attached

    def reset_parameters(self) -> None:
        """A scale of 1."""
        self.scale.fill_(1)

    def __getstate__(self) -> dict[str, Any]:
        # A copy does not take over a loss that this module has yet to hand out.
        return {**self.__dict__, "collected": None}

    def extra_repr(self) -> str:
        return self.mode


def set_auxiliary_scale(module: nn.Module, scale: float) -> None:
    """Set the factor on every attached loss in `module`: what the main loss is multiplied by before `backward`.

    With accumulation over n micro-batches of equal weight it is 1 / n; with a loss scaler, its scale.
    """
    for part in module.modules():
        if isinstance(part, AuxiliaryLoss):
            part.scale.fill_(scale)


@contextmanager
def keep_collected(module: nn.Module) -> Iterator[None]:
    """Leave what is collected in `module` as it is, whatever runs inside: for a pass that only repeats an earlier one."""
    parts = [part for part in module.modules() if isinstance(part, AuxiliaryLoss)]
    held = [part.collected for part in parts]
    try:
        yield
    finally:
        for part, loss in zip(parts, held, strict=True):
            part.collected = loss


def collect_auxiliary_losses(module: nn.Module) -> Tensor:
    """Sum of the (weighted) losses that the last forward collected in `module`; a scalar 0 if there are none.

    Each is handed out once: a second call before the next forward returns 0, so nothing is counted twice.
    """
    total = torch.zeros(())
    for part in module.modules():
        if isinstance(part, AuxiliaryLoss) and part.collected is not None:
            total = total.to(part.collected.device) + part.collected
            part.collected = None
    return total
