"""`linear_moe::gates`: the kernels of `linear_moe.kernels.gates` as a differentiable torch library operator."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from linear_moe.kernels import gates
from linear_moe.kernels.operator import differentiable, operator, side_by_side


@operator("gates")
def _gates(
    x: Tensor | None, y: Tensor | None, rate: Tensor | None, shift: Tensor | None, largest: float
) -> tuple[Tensor, Tensor]:
    given = x if y is None else y
    assert given is not None
    with torch.cuda.device_of(given):
        return tuple(gates.forward(x, y, rate, shift, largest))  # type: ignore[return-value]


@torch.library.register_fake("linear_moe::gates")
def _(x, y, rate, shift, largest):
    given = x if y is None else y
    return tuple(given.new_empty(0 if z is None else z.shape, dtype=torch.float32) for z in (x, y))


@operator("gates_backward")
def _gates_backward(
    d_log_decay: Tensor, d_beta: Tensor, x: Tensor | None, y: Tensor | None, rate: Tensor | None, shift: Tensor | None,
    largest: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    d_x, d_y = (None if z is None else z.new_empty(z.shape) for z in (x, y))
    with torch.cuda.device_of(d_beta):
        sums = gates.backward(d_log_decay, d_beta, x, y, rate, shift, largest, d_x, d_y)
    none = d_beta.new_empty(0)
    if sums is None or rate is None or shift is None:
        d_rate, d_shift = none, none.clone()
    else:
        d_rate, d_shift = sums[1].to(rate.dtype, copy=True), sums[0].to(shift.dtype, copy=True)
    return none.clone() if d_x is None else d_x, none.clone() if d_y is None else d_y, d_rate, d_shift


@torch.library.register_fake("linear_moe::gates_backward")
def _(d_log_decay, d_beta, x, y, rate, shift, largest):
    none = d_beta.new_empty(0)
    return tuple(none.clone() if z is None else z.new_empty(z.shape) for z in (x, y, rate, shift))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.largest = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, d_log_decay: Tensor, d_beta: Tensor) -> tuple[Tensor | None, ...]:
    x, y, rate, shift = ctx.saved_tensors
    made = _gates_backward(d_log_decay.contiguous(), d_beta.contiguous(), x, y, rate, shift, ctx.largest)
    gradients = (None if z is None else d_z for z, d_z in zip((x, y, rate, shift), made, strict=True))
    return *gradients, None


differentiable(_gates, _keep, _gradients)


class Decay(NamedTuple):
    """What a log decay is made of."""

    x: Tensor
    """`[R, H]`"""
    rate: Tensor
    """`[H]`"""
    shift: Tensor
    """`[H]`"""


class Strength(NamedTuple):
    """What a write's strength is made of."""

    y: Tensor
    """`[R, H]`"""
    largest: float


def make_gates(decay: Decay | None, strength: Strength | None) -> tuple[Tensor | None, Tensor | None]:
    """Make log_decay = -exp(rate) softplus(x + shift) and beta = largest sigmoid(y), each `[R, H]` float32 or None.

    Args:
        decay: of floats that the kernels take, rows any distance apart; None for no decay.
        strength: likewise. At least one is given, and both have one shape, dtype and device.

    Returns:
        Differentiable in x, y, rate and shift. The same input gives the same bits.
    """
    x, rate, shift = (None, None, None) if decay is None else decay
    y, largest = (None, 1.0) if strength is None else strength
    assert x is not None or y is not None
    x, y = (None if z is None else side_by_side(z) for z in (x, y))
    rate, shift = (None if z is None else z.contiguous() for z in (rate, shift))
    log_decay, beta = _gates(x, y, rate, shift, largest)
    return None if x is None else log_decay, None if y is None else beta
