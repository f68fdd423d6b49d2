"""`linear_moe::route`: the router of `linear_moe.kernels.router` as a torch library operator, and its gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linear_moe.kernels import router as kernels
from linear_moe.kernels.compile_ahead import compile_ahead
from linear_moe.kernels.operator import operator

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Route(NamedTuple):
    """Where tokens go, what the router is charged for it, and how even it is. Only weights, loss and tokens have gradients."""

    indices: Tensor
    """`[S, k]` int64: the picked choices, best first; with `shared` `[S, k + 1]`, the last M."""
    weights: Tensor
    """Their weights, float32; with `shared` the last is 1."""
    loss: Tensor
    """Scalar: the balance loss and the z-loss times their weights."""
    load: Tensor
    """`[M]` fraction of the picks of real tokens that each choice got."""
    entropy: Tensor
    """Scalar, nats: mean over real tokens."""
    balance_loss: Tensor
    """Scalar: M sum_m f_m P_m, 1 at balance."""
    z_loss: Tensor
    """Scalar: mean over real tokens of logsumexp(logits)^2."""
    tokens: Tensor
    """x, for its next use."""


@operator("route")
def _route(
    x: Tensor, weight: Tensor, valid: Tensor, bias: Tensor | None, top_k: int, shared: bool, sigmoid: bool,
    renormalize: bool, balance_weight: float, z_weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    options = kernels.Options(top_k, shared, sigmoid, renormalize, balance_weight, z_weight)
    with torch.cuda.device_of(x):
        return tuple(kernels.forward(x, weight, valid, bias, options))  # type: ignore[return-value]


@torch.library.register_fake("linear_moe::route")
def _(x, weight, valid, bias, top_k, shared, sigmoid, renormalize, balance_weight, z_weight):
    tokens, choices = x.shape[0], weight.shape[0]
    # A traced integer plus a bool is no integer to every release of torch.
    num_picks = top_k + 1 if shared else top_k
    return (
        x.new_empty(tokens, num_picks, dtype=torch.float32),
        x.new_empty(tokens, num_picks, dtype=torch.int64),
        x.new_empty((), dtype=torch.float32),
        x.new_empty(choices + kernels.NUM_SCALARS, dtype=torch.float32),
        x.new_empty(tokens, choices, dtype=torch.float32),
    )


@operator("route_backward")
def _route_backward(
    d_weights: Tensor | None, d_loss: Tensor | None, addend: Tensor | None, x: Tensor, weight: Tensor, valid: Tensor,
    indices: Tensor, statistics: Tensor, logits: Tensor, top_k: int, shared: bool, sigmoid: bool, renormalize: bool,
    balance_weight: float, z_weight: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    options = kernels.Options(top_k, shared, sigmoid, renormalize, balance_weight, z_weight)
    with torch.cuda.device_of(x):
        return kernels.backward(d_weights, d_loss, addend, x, weight, valid, indices, statistics, logits, options)


@torch.library.register_fake("linear_moe::route_backward")
def _(
    d_weights, d_loss, addend, x, weight, valid, indices, statistics, logits, top_k, shared, sigmoid, renormalize,
    balance_weight, z_weight,
):  # fmt: skip
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _both_passes(x: Tensor, weight: Tensor, valid: Tensor, bias: Tensor | None, options: tuple[Any, ...]) -> None:
    """For what they compile."""
    weights, indices, loss, statistics, logits = _route(x, weight, valid, bias, *options)
    charged = any(options[-2:])
    _route_backward(weights, loss if charged else None, x, x, weight, valid, indices, statistics, logits, *options)


class _Route(torch.autograd.Function):
    """The tokens come out once more: what their other uses send back is added in the kernel of the router's own gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, valid: Tensor, bias: Tensor | None, *options: Any
    ) -> tuple[Tensor, ...]:
        # A trace goes through here, and nothing runs.
        if not torch.compiler.is_compiling():
            compile_ahead(x.device, _route, lambda: _both_passes(x, weight, valid, bias, options))
        made = _route(x, weight, valid, bias, *options)
        _, indices, _, statistics, logits = made
        ctx.options = options
        ctx.save_for_backward(x, weight, valid, indices, statistics, logits)
        tokens = x.view_as(x)
        # Of tokens that want no gradient nothing need be sent back.
        constant = () if ctx.needs_input_grad[0] else (tokens,)
        ctx.mark_non_differentiable(indices, statistics, logits, *constant)
        ctx.set_materialize_grads(False)
        return *made, tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        d_weights, _, d_loss, _, _, d_x = (None if each is None else each.contiguous() for each in gradients)
        return *_route_backward(d_weights, d_loss, d_x, *ctx.saved_tensors, *ctx.options), *(None,) * 8


def route(
    x: Tensor,
    weight: Tensor,
    valid: Tensor,
    *,
    top_k: int,
    score: str = "softmax",
    renormalize: bool = True,
    bias: Tensor | None = None,
    shared: bool = False,
    balance_weight: float = 0.0,
    z_loss_weight: float = 0.0,
) -> Route:
    """Route tokens to the `top_k` choices of the best scores of `x W^T`, as `linear_moe.layers.routing.Router` has it.

    Logits are float32, summed over D in an order that does not depend on the number of tokens. The same input gives the same
    bits, and nothing waits for the device.

    Args:
        x: `[S, D]` float32, bfloat16 or float16.
        weight: `[M, D]` of any of these, M up to 256.
        valid: `[S]` bool. Pads are routed somewhere, are in no statistic, and give no gradient, whatever is asked of them.
        top_k: picks a token, from 1 to M. Ties go to the lowest index.
        score: "softmax" or "sigmoid".
        renormalize: whether the picked weights are made to sum to 1.
        bias: `[M]` float32 added to the scores, for picking only.
        shared: whether choice M stands behind each token's picks, with weight 1.
        balance_weight: of the balance loss, in `loss`.
        z_loss_weight: of the z-loss, in `loss`.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    _check(x, weight, valid, bias, top_k, score)
    weights, indices, loss, statistics, _, tokens = _Route.apply(
        x.contiguous(), weight.contiguous(), valid.contiguous(), None if bias is None else bias.contiguous(), top_k, shared,
        score == "sigmoid", renormalize, balance_weight, z_loss_weight,
    )  # fmt: skip
    choices = weight.shape[0]
    return Route(
        indices, weights, loss, statistics[:choices], statistics[choices], statistics[choices + 1], statistics[choices + 2],
        tokens,
    )  # fmt: skip


def _check(x: Tensor, weight: Tensor, valid: Tensor, bias: Tensor | None, top_k: int, score: str) -> None:
    if x.dim() != 2:
        raise ValueError(f"x must be [S, D], got shape {list(x.shape)}")
    if weight.dim() != 2 or weight.shape[1] != x.shape[1] or not 1 <= weight.shape[0] <= kernels.LARGEST_CHOICES:
        raise ValueError(
            f"weight must be [M, D] with M from 1 to {kernels.LARGEST_CHOICES} and D = {x.shape[1]}, "
            f"got shape {list(weight.shape)}"
        )
    if not 1 <= top_k <= weight.shape[0]:
        raise ValueError(f"top_k must be from 1 to M = {weight.shape[0]}, got {top_k}")
    if score not in ("softmax", "sigmoid"):
        raise ValueError(f"score must be softmax or sigmoid, got {score!r}")
    for name, tensor, shape, meaning in (("valid", valid, x.shape[:1], "[S]"), ("bias", bias, weight.shape[:1], "[M]")):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {meaning} = {list(shape)}, got shape {list(tensor.shape)}")
    for name, tensor, dtypes in (
        ("x", x, _FLOATS),
        ("weight", weight, _FLOATS),
        ("valid", valid, (torch.bool,)),
        ("bias", bias, (torch.float32,)),
    ):
        if tensor is None:
            continue
        if tensor.dtype not in dtypes:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(f"{name} must be of dtype {allowed}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on the device {x.device}, got {tensor.device}")
