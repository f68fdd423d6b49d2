"""Cross entropy from hidden vectors, without the logits of all tokens at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linear_moe.layers.projections import autocast_dtype
from linear_moe.rules.base import upcast

LOGITS_AT_ONCE = 1 << 26
"""256 MB in float32: what more would save in launches is nothing beside the products."""


class _SummedCrossEntropy(torch.autograd.Function):
    """The gradients are made with the loss, from logits that are there once: nothing is made twice, nothing is kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        dtype = autocast_dtype(hidden)
        matrix = weight.to(dtype)
        wide = upcast(hidden).dtype
        wants_hidden, wants_weight, _ = ctx.needs_input_grad
        hidden_gradient = torch.empty_like(hidden) if wants_hidden else None
        weight_gradient = torch.zeros_like(weight, dtype=wide) if wants_weight else None
        rows = max(LOGITS_AT_ONCE // weight.shape[0], 1)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], rows):
                part = hidden[start : start + rows].to(dtype)
                label = labels[start : start + rows, None]
                logits = upcast(part @ matrix.mT)
                normaliser = logits.logsumexp(-1, keepdim=True)
                total += (normaliser - logits.gather(-1, label)).sum()
                if not (wants_hidden or wants_weight):
                    continue
                # The probabilities, less 1 at the label.
                gradient = logits.sub_(normaliser).exp_()
                gradient.scatter_(-1, label, gradient.gather(-1, label) - 1)
                gradient = gradient.to(dtype)
                if hidden_gradient is not None:
                    hidden_gradient[start : start + rows] = gradient @ matrix
                if weight_gradient is not None:
                    weight_gradient += gradient.mT @ part
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, weight = ctx.saved_tensors
        return (
            # Not in 16 bits: a scale that is rounded is an error in every gradient.
            None if hidden is None else (upcast(hidden) * scale).to(hidden.dtype),
            None if weight is None else (weight * scale).to(ctx.weight_dtype),
            None,
        )


def summed_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum over tokens of the cross entropy of softmax(weight hidden) and the labels, in nats.

    The logits of a block of tokens are made, used and forgotten, with their gradient: all of them at once would be the largest
    tensor of training by far.

    Args:
        hidden: `[L, D]`.
        weight: `[V, D]`, of the head.
        labels: `[L]` int64.

    Returns:
        A scalar in float32 (float64 for float64 input). Products are in the dtype of `hidden`, or autocast's.
    """
    total: Tensor = _SummedCrossEntropy.apply(hidden, weight, labels)
    return total
