"""A block's steps around its mixer as torch library operators: the residual addition with its norm, and the gated unit.

An operator takes and returns tensors and numbers. What is not made is an empty tensor there, None outside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linear_moe.kernels import residual_norm, swiglu
from linear_moe.kernels.operator import FLOATS, check_tensor, differentiable, operator


@operator("residual_norm")
def _residual_norm(
    residual: Tensor, branch: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(residual):
        made = residual_norm.forward(residual, branch, weight, eps, dtype)
    return residual.new_empty(0) if made.sum is None else made.sum, made.normed, made.factor


@torch.library.register_fake("linear_moe::residual_norm")
def _(residual, branch, weight, eps, dtype):
    return (
        residual.new_empty(0 if branch is None else residual.shape),
        residual.new_empty(residual.shape, dtype=dtype),
        residual.new_empty(residual.shape[:-1], dtype=torch.float32),
    )


@operator("residual_norm_backward")
def _residual_norm_backward(
    d_sum: Tensor | None, d_normed: Tensor, summed: Tensor, factor: Tensor, weight: Tensor,
    branch_dtype: torch.dtype | None, want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    with torch.cuda.device_of(summed):
        made = residual_norm.backward(
            d_sum, d_normed, summed, factor, weight, branch_dtype=branch_dtype, want_weight=want_weight
        )
    return (
        made.residual,
        summed.new_empty(0) if made.branch is None else made.branch,
        weight.new_empty(0) if made.weight is None else made.weight,
    )


@torch.library.register_fake("linear_moe::residual_norm_backward")
def _(d_sum, d_normed, summed, factor, weight, branch_dtype, want_weight):
    return (
        summed.new_empty(summed.shape),
        summed.new_empty(0) if branch_dtype is None else summed.new_empty(summed.shape, dtype=branch_dtype),
        weight.new_empty(weight.shape if want_weight else 0),
    )


def _keep_for_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    residual, branch, weight, *_ = inputs
    ctx.branch_dtype = None if branch is None else branch.dtype
    ctx.save_for_backward(residual if branch is None else output[0], output[2], weight)
    ctx.set_materialize_grads(False)


def _norm_gradients(
    ctx: Any, d_sum: Tensor | None, d_normed: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    summed, factor, weight = ctx.saved_tensors
    if ctx.branch_dtype is None:
        # Of the empty tensor that stands for no sum.
        d_sum = None
    if d_normed is None:
        # Only the stream went on.
        d_branch = None if d_sum is None or ctx.branch_dtype is None else d_sum.to(ctx.branch_dtype)
        return d_sum, d_branch, None, None, None
    other = ctx.branch_dtype if ctx.branch_dtype != summed.dtype and ctx.needs_input_grad[1] else None
    want_weight = ctx.needs_input_grad[2]
    d_residual, d_branch, d_weight = _residual_norm_backward(
        None if d_sum is None else d_sum.contiguous(),
        d_normed.contiguous(),
        summed,
        factor,
        weight,
        other,
        want_weight,
    )
    if other is None:
        d_branch = None if ctx.branch_dtype is None else d_residual
    return d_residual, d_branch, d_weight if want_weight else None, None, None


differentiable(_residual_norm, _keep_for_norm, _norm_gradients)


def add_and_norm(
    residual: Tensor, branch: Tensor | None, weight: Tensor, *, eps: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The sum s = residual + branch, and s / sqrt(mean(s^2) + eps) * weight, the mean over the last dim.

    Args:
        residual: `[..., D]` float32, bfloat16 or float16, D up to 8192.
        branch: `[..., D]` of any of those, or None: nothing is added.
        weight: `[D]` of any of those.
        eps: added to the mean square.
        dtype: of the normed tensor; the residual's unless given.

    Returns:
        The sum in the dtype of the residual (the residual itself without a branch) and the normed tensor, made in float32 of
        the rounded sum. Differentiable in the residual, the branch and the weight; the same input gives the same bits, and
        a row the same beside any others.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    width = residual.shape[-1] if residual.dim() else 0
    if not 1 <= width <= residual_norm.LARGEST_WIDTH:
        raise ValueError(
            f"residual must be [..., D] with D from 1 to {residual_norm.LARGEST_WIDTH}, got {list(residual.shape)}"
        )
    shape = tuple(residual.shape)
    for name, tensor, expected, meaning in (
        ("residual", residual, shape, "[..., D]"),
        ("branch", branch, shape, "[..., D]"),
        ("weight", weight, (width,), "[D]"),
    ):
        if tensor is not None:
            check_tensor(name, tensor, expected, meaning, FLOATS, residual.device)
    dtype = residual.dtype if dtype is None else dtype
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    added = None if branch is None else branch.contiguous()
    summed, normed, _ = _residual_norm(residual.contiguous(), added, weight.contiguous(), eps, dtype)
    return residual if branch is None else summed, normed


@operator("swiglu")
def _swiglu(x: Tensor) -> Tensor:
    with torch.cuda.device_of(x):
        return swiglu.forward(x)


@torch.library.register_fake("linear_moe::swiglu")
def _(x):
    return x.new_empty(x.shape[0], x.shape[1] // 2)


@operator("swiglu_backward")
def _swiglu_backward(d_output: Tensor, x: Tensor) -> Tensor:
    with torch.cuda.device_of(x):
        return swiglu.backward(d_output, x)


@torch.library.register_fake("linear_moe::swiglu_backward")
def _(d_output, x):
    return x.new_empty(x.shape)


def _keep_for_swiglu(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_gradient(ctx: Any, d_output: Tensor) -> tuple[Tensor]:
    return (_swiglu_backward(d_output.contiguous(), *ctx.saved_tensors),)


differentiable(_swiglu, _keep_for_swiglu, _swiglu_gradient)


def gated_unit(x: Tensor) -> Tensor:
    """SiLU(gate) * up of `x` `[..., 2W]`, the gates in front: `[..., W]`.

    Args:
        x: float32, bfloat16 or float16.

    Returns:
        In the dtype of x, made in float32. Differentiable; the same input gives the same bits.

    Raises:
        ValueError: if `x` does not fit.
    """
    if x.dim() < 1 or x.shape[-1] < 2 or x.shape[-1] % 2:
        raise ValueError(f"x must be [..., 2W] with W at least 1, got shape {list(x.shape)}")
    check_tensor("x", x, None, "", FLOATS, x.device)
    output: Tensor = _swiglu(x.reshape(-1, x.shape[-1]).contiguous())
    return output.view(*x.shape[:-1], output.shape[1])
