"""Cross entropy from hidden vectors, without the logits of all tokens at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linear_moe.layers.projections import autocast_dtype
from linear_moe.rules.base import upcast
from linear_moe.rules.scan import TRITON_INSTALLED

LOGITS_AT_ONCE = 1 << 27
"""256 MB in bfloat16: what more would save in launches is nothing beside the products."""


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
                logits, label = part @ matrix.mT, labels[start : start + rows]
                loss, gradient = _losses(logits, label, wants_hidden or wants_weight)
                total += loss
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


def _losses(logits: Tensor, labels: Tensor, wants_gradient: bool) -> tuple[Tensor, Tensor]:
    """The sum of the rows' cross entropies and, if wanted, its gradient, in place of the logits where that is possible."""
    if logits.is_cuda and TRITON_INSTALLED and logits.dtype != torch.float64:
        from linear_moe.kernels.cross_entropy_operator import cross_entropy_

        return cross_entropy_(logits, labels, wants_gradient).sum(), logits
    wide, label = upcast(logits), labels[:, None]
    normaliser = wide.logsumexp(-1, keepdim=True)
    loss = (normaliser - wide.gather(-1, label)).sum()
    if not wants_gradient:
        return loss, logits
    # The probabilities, less 1 at the label.
    gradient = wide.sub_(normaliser).exp_()
    gradient.scatter_(-1, label, gradient.gather(-1, label) - 1)
    return loss, gradient.to(logits.dtype)


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
