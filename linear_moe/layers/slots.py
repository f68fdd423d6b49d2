"""Moving rows between tokens and the slots they were routed to, without an addition whose order could vary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linear_moe.layers.routing import SlotPlan


class _GatherTokens(torch.autograd.Function):
    """Rows of tokens in slot order. The gradient of a token is the sum over its slots, in their order: no atomics."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, place: Tensor, fan_out: int, kernel: bool) -> Tensor:
        ctx.save_for_backward(place)
        ctx.fan_out, ctx.kernel = fan_out, kernel
        return tokens.index_select(0, order // fan_out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (place,) = ctx.saved_tensors
        slots = gradients[0]
        if ctx.kernel and slots.shape[0]:
            from linear_moe.kernels.mixing import sum_slots

            return sum_slots(slots.contiguous(), place.view(-1, ctx.fan_out), ()), None, None, None, None
        slots = slots.index_select(0, place)
        return slots.unflatten(0, (-1, ctx.fan_out)).sum(1) if slots.shape[0] else slots, None, None, None, None


def gather_tokens(tokens: Tensor, plan: SlotPlan, fan_out: int, *, kernel: bool = False) -> Tensor:
    """`[S, C]` to `[S * fan_out, C]` in the plan's order; slot i belongs to token i // fan_out.

    `kernel`: whether the gradient is summed by a kernel, which reads it once.
    """
    if plan.identity:
        return tokens
    gathered: Tensor = _GatherTokens.apply(tokens, plan.order, plan.place, fan_out, kernel)
    return gathered


def scatter_slots(slots: Tensor, plan: SlotPlan, fan_out: int) -> Tensor:
    """`[S * fan_out, ...]` in the plan's order to `[S, fan_out, ...]`."""
    by_token = slots if plan.identity else slots.index_select(0, plan.place)
    return by_token.reshape(-1, fan_out, *slots.shape[1:])
