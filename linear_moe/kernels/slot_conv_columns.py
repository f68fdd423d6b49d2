"""`linear_moe::column_convs`: ranges of one projection's columns convolved to tensors of their own, with one gradient for all.

Convolved one by one, the ranges' gradients would be put together in one more pass over all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from linear_moe.kernels import slot_conv as kernels
from linear_moe.kernels.blocks import new_rows
from linear_moe.kernels.operator import differentiable, operator
from linear_moe.kernels.slot_conv_operator import check_slot_conv, segment_of_slots


def _parts(
    x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor, segment: Tensor, widths: Sequence[int],
    norm_heads: Sequence[int], silu: bool,
) -> list[tuple[slice, kernels.Conv]]:  # fmt: skip
    """The columns of each range, and its convolution."""
    borders = [0, *itertools.accumulate(widths)]
    columns = [slice(*pair) for pair in itertools.pairwise(borders)]
    return [
        (part, kernels.Conv(
            x[:, part], weight[part], None if bias is None else bias[part], cu_seqlens, segment, None, None, silu,
            head or None,
        ))
        for part, head in zip(columns, norm_heads, strict=True)
    ]  # fmt: skip


@operator("column_convs")
def _column_convs(
    x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor, segment: Tensor, widths: Sequence[int],
    norm_heads: Sequence[int], silu: bool,
) -> list[Tensor]:  # fmt: skip
    with torch.cuda.device_of(x):
        parts = _parts(x, weight, bias, cu_seqlens, segment, widths, norm_heads, silu)
        made = [kernels.forward(conv) for _, conv in parts]
    rest = x[:, sum(widths) :]
    return [*made, x.new_empty(rest.shape).copy_(rest)]


@torch.library.register_fake("linear_moe::column_convs")
def _(x, weight, bias, cu_seqlens, segment, widths, norm_heads, silu):
    return [x.new_empty(x.shape[0], width) for width in (*widths, x.shape[1] - sum(widths))]


@operator("column_convs_backward")
def _column_convs_backward(
    d_outputs: Sequence[Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor, segment: Tensor,
    widths: Sequence[int], norm_heads: Sequence[int], silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    *d_parts, d_rest = d_outputs
    d_x = new_rows(x, *x.shape)
    d_x[:, sum(widths) :] = d_rest
    with torch.cuda.device_of(x):
        made = [
            kernels.backward(conv, d_part, None, None, want_x=True, d_x=d_x[:, part])
            for (part, conv), d_part in zip(
                _parts(x, weight, bias, cu_seqlens, segment, widths, norm_heads, silu), d_parts, strict=True
            )
        ]
    d_bias = x.new_empty(0) if bias is None else torch.cat([part.bias for part in made if part.bias is not None])
    return d_x, torch.cat([part.weight for part in made]), d_bias


@torch.library.register_fake("linear_moe::column_convs_backward")
def _(d_outputs, x, weight, bias, cu_seqlens, segment, widths, norm_heads, silu):
    d_bias = x.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return new_rows(x, *x.shape), weight.new_empty(weight.shape), d_bias


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *tensors, ctx.widths, ctx.norm_heads, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, d_outputs: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    x, weight, bias, cu_seqlens, segment = ctx.saved_tensors
    widths = (*ctx.widths, x.shape[1] - sum(ctx.widths))
    given = [
        x.new_zeros(x.shape[0], width) if d_output is None else d_output.contiguous()
        for d_output, width in zip(d_outputs, widths, strict=True)
    ]
    d_x, d_weight, d_bias = _column_convs_backward(
        given, x, weight, bias, cu_seqlens, segment, ctx.widths, ctx.norm_heads, ctx.silu
    )
    return d_x, d_weight, None if bias is None else d_bias, None, None, None, None, None


differentiable(_column_convs, _keep, _gradients)


def column_convs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    widths: Sequence[int],
    norm_heads: Sequence[int | None],
    *,
    activation: str | None = None,
    segment: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """`slot_conv` of neighbouring ranges of the columns of x, without carried inputs; what is left of x comes out as it is.

    Args:
        x: `[R, C_x]`, a row a slot.
        weight: `[C, W]` of all ranges, C at most C_x.
        bias: `[C]` or None.
        cu_seqlens: `[N + 1]` int64.
        widths: columns of each range, from the first column on; C in sum.
        norm_heads: channels of a head to normalise, or None, for each range.
        activation: None or "silu", for all.
        segment: `[R]` int32, what `segment_of_slots` makes.

    Returns:
        `[R, width]` for each range and `[R, C_x - C]`, contiguous. Differentiable in x, weight and bias.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    if x.dim() != 2 or sum(widths) > x.shape[1]:
        raise ValueError(f"x must be [R, {sum(widths)} or more], as widths add up to, got shape {list(x.shape)}")
    if not widths or min(widths) < 1:
        raise ValueError(f"widths must be at least 1, got {list(widths)}")
    if len(norm_heads) != len(widths):
        raise ValueError(f"norm_heads must have one for each of {len(widths)} widths, got {len(norm_heads)}")
    channels = sum(widths)
    for width, head in zip(widths, norm_heads, strict=True):
        if head is not None and (not 1 <= head <= kernels.LARGEST_HEAD or width % head):
            raise ValueError(
                f"norm_heads must be divisors of {list(widths)}, at most {kernels.LARGEST_HEAD}, or None, got {head}"
            )
    check_slot_conv(x[:, :channels], weight, bias, cu_seqlens, None, None, segment, None, activation, None)
    segment = segment_of_slots(cu_seqlens, x.shape[0]) if segment is None else segment
    made = _column_convs(
        x if x.stride(1) == 1 else x.contiguous(),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        cu_seqlens.contiguous(),
        segment,
        list(widths),
        [head or 0 for head in norm_heads],
        activation == "silu",
    )
    return tuple(made)
