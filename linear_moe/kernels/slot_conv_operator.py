"""`linear_moe::slot_conv`: the convolution of `linear_moe.kernels.slot_conv` as a differentiable torch library operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linear_moe.kernels import slot_conv as kernels
from linear_moe.kernels import slot_conv_state as carried_inputs
from linear_moe.kernels.operator import differentiable, operator, side_by_side

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = (None, "silu")


def _empty(like: Tensor) -> Tensor:
    return like.new_empty(0)


@operator("slot_conv")
def _slot_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor, segment: Tensor, source: Tensor | None,
    place: Tensor | None, state: Tensor | None, silu: bool, norm_heads: int | None, want_state: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    conv = kernels.Conv(x, weight, bias, cu_seqlens, segment, source, state, silu, norm_heads)
    with torch.cuda.device_of(x):
        return kernels.forward(conv), carried_inputs.carry(conv) if want_state else _empty(x)


@torch.library.register_fake("linear_moe::slot_conv")
def _(x, weight, bias, cu_seqlens, segment, source, place, state, silu, norm_heads, want_state):
    shape = (cu_seqlens.shape[0] - 1, weight.shape[1], weight.shape[0])
    carried = x.new_empty(shape, dtype=x.dtype if state is None else state.dtype) if want_state else _empty(x)
    return x.new_empty(segment.shape[0], weight.shape[0]), carried


@operator("slot_conv_backward")
def _slot_conv_backward(
    d_output: Tensor, d_carried: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor,
    segment: Tensor, source: Tensor | None, place: Tensor | None, state: Tensor | None, silu: bool,
    norm_heads: int | None, want_x: bool, want_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    conv = kernels.Conv(x, weight, bias, cu_seqlens, segment, source, state, silu, norm_heads)
    with torch.cuda.device_of(x):
        sums = kernels.new_sums(conv.num_slots, weight, bias)
        d_x = kernels.backward(conv, d_output, d_carried, place, sums, want_x=want_x)
        d_weight, d_bias = kernels.sum_runs(sums, weight, bias)
        d_state = carried_inputs.state_gradient(conv, d_output, d_carried) if want_state else _empty(x)
    return _empty(x) if d_x is None else d_x, d_weight, _empty(x) if d_bias is None else d_bias, d_state


@torch.library.register_fake("linear_moe::slot_conv_backward")
def _(
    d_output, d_carried, x, weight, bias, cu_seqlens, segment, source, place, state, silu, norm_heads, want_x, want_state
):  # fmt: skip
    return (
        x.new_empty(x.shape) if want_x else _empty(x),
        weight.new_empty(weight.shape),
        _empty(x) if bias is None else bias.new_empty(bias.shape),
        state.new_empty(state.shape) if want_state else _empty(x),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.silu, ctx.norm_heads, ctx.carries = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, d_output: Tensor | None, d_carried: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    if d_output is None:
        d_output = tensors[0].new_zeros(tensors[4].shape[0], tensors[1].shape[0])
    if d_carried is not None:
        d_carried = d_carried.contiguous() if ctx.carries else None
    want_x, want_state = ctx.needs_input_grad[0], tensors[7] is not None and ctx.needs_input_grad[7]
    d_x, d_weight, d_bias, d_state = _slot_conv_backward(
        d_output.contiguous(), d_carried, *tensors, ctx.silu, ctx.norm_heads, want_x, want_state
    )
    d_bias = None if tensors[2] is None else d_bias
    return (
        d_x if want_x else None, d_weight, d_bias, *(None,) * 4, d_state if want_state else None, *(None,) * 3,
    )  # fmt: skip


differentiable(_slot_conv, _keep, _gradients)


def segment_of_slots(cu_seqlens: Tensor, num_slots: int) -> Tensor:
    """`[R]` int32: the segment of each slot, and N of those past the last border `cu_seqlens` `[N + 1]`."""
    slots = torch.arange(num_slots, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:], slots, right=True, out_int32=True)


def slot_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    *,
    source: Tensor | None = None,
    place: Tensor | None = None,
    segment: Tensor | None = None,
    state: Tensor | None = None,
    activation: str | None = None,
    norm_heads: int | None = None,
    return_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The short causal convolution along each segment of slots, an activation, and an l2 norm of each head.

    z_r = bias + sum_w weight[:, w] x_{r - W + 1 + w}, never across a segment's border; then y = z or SiLU(z); then y, or
    y / sqrt(sum(y^2) + 1e-6) over every `norm_heads` channels. In float32, rounded once. Nothing waits for the device, so the
    values of `cu_seqlens`, `source` and `place` are not checked.

    Args:
        x: `[S, C]` float32, bfloat16 or float16. Rows may lie further apart than C: a range of a projection's columns.
        weight: `[C, W]`, W at most 8, the last column on the slot itself.
        bias: `[C]` or None.
        cu_seqlens: `[N + 1]` int64 borders of the segments of R slots. Slots past the last are in none; their output is 0.
        source: `[R]` int64 the row of x that each slot reads. None: slot r reads row r, and R = S.
        place: `[S, F]` int64 the inverse of `source`: the slots that read each row of x, negative where fewer than F do. For
            the gradient of x, which is the sum over a row's slots in this order.
        segment: `[R]` int32, what `segment_of_slots` makes; several convolutions along the same segments can share it.
        state: `[N, W, C]` the last W inputs of each segment before this call, zeros if None.
        activation: None or "silu".
        norm_heads: channels of a head to normalise, at most 256 and a divisor of C; None for no norm.
        return_state: whether to make the new state.

    Returns:
        `[R, C]` in the dtype of x, and the new state `[N, W, C]` in the dtype of the old one (of x without one) or None. A
        segment without slots keeps its state, bit for bit. Differentiable in x, weight, bias and state; the same input gives
        the same bits.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    check_slot_conv(x, weight, bias, cu_seqlens, source, place, segment, state, activation, norm_heads)
    num_slots = x.shape[0] if source is None else source.shape[0]
    output, carried = _slot_conv(
        side_by_side(x),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        cu_seqlens.contiguous(),
        segment_of_slots(cu_seqlens, num_slots) if segment is None else segment,
        None if source is None else source.contiguous(),
        None if place is None else place.contiguous(),
        None if state is None else state.contiguous(),
        activation == "silu",
        norm_heads,
        return_state,
    )
    return output, carried if return_state else None


def check_slot_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    source: Tensor | None,
    place: Tensor | None,
    segment: Tensor | None,
    state: Tensor | None,
    activation: str | None,
    norm_heads: int | None,
) -> None:
    """Raise ValueError for arguments of `slot_conv` that do not fit."""
    for name, tensor, dims, meaning in (
        ("x", x, 2, "[S, C]"),
        ("weight", weight, 2, "[C, W]"),
        ("cu_seqlens", cu_seqlens, 1, "[N + 1]"),
        ("source", source, 1, "[R]"),
        ("place", place, 2, "[S, F]"),
    ):
        if tensor is not None and tensor.dim() != dims:
            raise ValueError(f"{name} must be {meaning}, got shape {list(tensor.shape)}")
    (num_rows, channels), width = x.shape, weight.shape[1]
    num_slots, num_segments = num_rows if source is None else source.shape[0], cu_seqlens.shape[0] - 1
    if not 1 <= width <= kernels.LARGEST_WIDTH:
        raise ValueError(f"weight must have a W of 1 to {kernels.LARGEST_WIDTH}, got {width}")
    if num_segments < 1:
        raise ValueError("cu_seqlens must have the borders of a segment at least, got one border")
    if activation not in ACTIVATIONS:
        raise ValueError(f'activation must be None or "silu", got {activation!r}')
    if norm_heads is not None and (not 1 <= norm_heads <= kernels.LARGEST_HEAD or channels % norm_heads):
        raise ValueError(
            f"norm_heads must be a divisor of C = {channels}, at most {kernels.LARGEST_HEAD}, or None, got {norm_heads}"
        )
    for name, tensor, shape, meaning, dtypes in (
        ("x", x, (num_rows, channels), "[S, C]", _FLOATS),
        ("weight", weight, (channels, width), "[C, W]", _FLOATS),
        ("bias", bias, (channels,), "[C]", _FLOATS),
        ("cu_seqlens", cu_seqlens, (num_segments + 1,), "[N + 1]", (torch.int64,)),
        ("source", source, (num_slots,), "[R]", (torch.int64,)),
        ("place", place, (num_rows, place.shape[1] if place is not None else 0), "[S, F]", (torch.int64,)),
        ("segment", segment, (num_slots,), "[R]", (torch.int32,)),
        ("state", state, (num_segments, width, channels), "[N, W, C]", _FLOATS),
    ):
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {meaning} = {list(shape)}, got shape {list(tensor.shape)}")
        if tensor.dtype not in dtypes:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(f"{name} must be of dtype {allowed}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")
    if channels < 1:
        raise ValueError("x must have a channel at least, got none")
    if source is not None and place is None and x.requires_grad and torch.is_grad_enabled():
        raise ValueError("place must be given where x is read through a source and needs a gradient, got None")
