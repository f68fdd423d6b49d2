"""`linear_moe::slot_convs`: the convolutions of a call's projections and the gates beside them, as one operator.

Each makes a tensor of its own out of a range of a projection's columns. As operators of their own they would cost the host of a
short call more than the device, and the gradients of ranges of one projection, or of one weight, would be put together in one
more pass over all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from linear_moe.forms import GateColumns
from linear_moe.kernels import gates as gate_kernels
from linear_moe.kernels import slot_conv as kernels
from linear_moe.kernels.blocks import new_rows
from linear_moe.kernels.operator import FLOATS, check_tensor, differentiable, operator, side_by_side
from linear_moe.kernels.slot_conv_operator import ACTIVATIONS, check_slot_conv, segment_of_slots


class Part(NamedTuple):
    """A range of a projection's columns that is convolved."""

    width: int
    first_channel: int
    """Of the weight and the bias."""
    activation: str | None = None
    """None or "silu"."""
    norm_heads: int | None = None
    """Channels of a head that an l2 norm follows on."""


class Mixed(NamedTuple):
    """What is made of projections."""

    parts: list[Tensor]
    """`[R, width]` each, contiguous."""
    log_decay: Tensor | None
    """`[R, H]` float32"""
    beta: Tensor | None
    """`[R, H]` float32"""
    rest: Tensor
    """`[R, *]` the columns of the slots' projection that are in no part and no gate, contiguous."""


class _Inputs(NamedTuple):
    """Of the operator, but for its layout."""

    slots: Tensor
    tokens: Tensor | None
    weight: Tensor
    bias: Tensor | None
    rate: Tensor | None
    shift: Tensor | None
    cu_seqlens: Tensor
    segment: Tensor
    source: Tensor | None
    place: Tensor | None


class _Layout(NamedTuple):
    """Of the columns and channels. Of the tokens' projection, if there is one, the last part is all."""

    widths: Sequence[int]
    norm_heads: Sequence[int]
    """0 for no norm."""
    channels: Sequence[int]
    silu: Sequence[bool]
    decay: int
    """The first column of the slots' projection that log decays are made of; negative: there are none."""
    strength: int
    """The same of strengths."""
    heads: int
    """0 without gates."""
    largest: float

    def in_parts(self, by_token: bool) -> int:
        """Columns of the slots' projection that are convolved."""
        return sum(self.widths[: len(self.widths) - by_token])

    def convs(self, given: _Inputs) -> Iterator[tuple[slice, slice, kernels.Conv]]:
        """The columns and channels of each part, and its convolution."""
        last, first = len(self.widths) - 1, 0
        for n, (width, head, channel) in enumerate(zip(self.widths, self.norm_heads, self.channels, strict=True)):
            columns, channels = slice(first, first + width), slice(channel, channel + width)
            x, source = given.slots[:, columns], None
            if n == last and given.tokens is not None:
                x, source = given.tokens, given.source
            weight, bias = given.weight[channels], None if given.bias is None else given.bias[channels]
            conv = kernels.Conv(
                x, weight, bias, given.cu_seqlens, given.segment, source, None, self.silu[n], head or None
            )
            yield columns, channels, conv
            first += width

    def gates(self, slots: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The columns of log decays and strengths, or of their gradients."""
        decay, strength = (
            None if first < 0 else slots[:, first : first + self.heads] for first in (self.decay, self.strength)
        )
        return decay, strength


@operator("slot_convs")
def _slot_convs(
    slots: Tensor, tokens: Tensor | None, weight: Tensor, bias: Tensor | None, rate: Tensor | None, shift: Tensor | None,
    cu_seqlens: Tensor, segment: Tensor, source: Tensor | None, place: Tensor | None, widths: Sequence[int],
    norm_heads: Sequence[int], channels: Sequence[int], silu: Sequence[bool], decay: int, strength: int, heads: int,
    largest: float,
) -> list[Tensor]:  # fmt: skip
    given = _Inputs(slots, tokens, weight, bias, rate, shift, cu_seqlens, segment, source, place)
    layout = _Layout(widths, norm_heads, channels, silu, decay, strength, heads, largest)
    with torch.cuda.device_of(slots):
        made = [kernels.forward(conv) for _, _, conv in layout.convs(given)]
        if heads:
            x, y = layout.gates(slots)
            gates = gate_kernels.forward(x, y, rate, shift, largest)
            return [*made, *gates, slots.new_empty(slots.shape[0], 0)]
    none = slots.new_empty(0, dtype=torch.float32)
    rest = slots[:, layout.in_parts(tokens is not None) :]
    return [*made, none, none.clone(), slots.new_empty(rest.shape).copy_(rest)]


@torch.library.register_fake("linear_moe::slot_convs")
def _(slots, tokens, weight, bias, rate, shift, cu_seqlens, segment, source, place, *layout):
    layout = _Layout(*layout)
    rows, heads = slots.shape[0], layout.heads
    left = 0 if heads else slots.shape[1] - layout.in_parts(tokens is not None)
    gates = ((rows, heads) if heads and first >= 0 else 0 for first in (layout.decay, layout.strength))
    return [
        *(slots.new_empty(rows, width) for width in layout.widths),
        *(slots.new_empty(shape, dtype=torch.float32) for shape in gates),
        slots.new_empty(rows, left),
    ]


@operator("slot_convs_backward")
def _slot_convs_backward(
    d_outputs: Sequence[Tensor], slots: Tensor, tokens: Tensor | None, weight: Tensor, bias: Tensor | None,
    rate: Tensor | None, shift: Tensor | None, cu_seqlens: Tensor, segment: Tensor, source: Tensor | None,
    place: Tensor | None, widths: Sequence[int], norm_heads: Sequence[int], channels: Sequence[int],
    silu: Sequence[bool], decay: int, strength: int, heads: int, largest: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    given = _Inputs(slots, tokens, weight, bias, rate, shift, cu_seqlens, segment, source, place)
    layout = _Layout(widths, norm_heads, channels, silu, decay, strength, heads, largest)
    *d_parts, d_log_decay, d_beta, d_rest = d_outputs
    d_slots, d_tokens, d_gates = new_rows(slots, *slots.shape), None, None
    with torch.cuda.device_of(slots):
        if heads:
            (x, y), (d_x, d_y) = layout.gates(slots), layout.gates(d_slots)
            d_gates = gate_kernels.backward(d_log_decay, d_beta, x, y, rate, shift, largest, d_x, d_y)
        elif d_rest.shape[1]:
            d_slots[:, layout.in_parts(tokens is not None) :] = d_rest
        sums = kernels.new_sums(slots.shape[0], weight, bias)
        for n, (columns, rows, conv) in enumerate(layout.convs(given)):
            own, d_conv = sums[..., rows], d_parts[n]
            if conv.x is tokens:
                d_tokens = kernels.backward(conv, d_conv, None, place, own, want_x=True)
            else:
                kernels.backward(conv, d_conv, None, None, own, want_x=True, d_x=d_slots[:, columns])
        d_weight, d_bias = kernels.sum_runs(sums, weight, bias)
    others = (x.new_empty(0) if made is None else made for x, made in ((slots, d_tokens), (weight, d_bias)))
    none = weight.new_empty(0, dtype=torch.float32)
    return d_slots, d_weight, *others, none if d_gates is None else d_gates  # type: ignore[return-value]


@torch.library.register_fake("linear_moe::slot_convs_backward")
def _(d_outputs, slots, tokens, weight, bias, rate, shift, cu_seqlens, segment, source, place, *layout):
    return (
        new_rows(slots, *slots.shape),
        weight.new_empty(weight.shape),
        slots.new_empty(0 if tokens is None else tokens.shape),
        weight.new_empty(0 if bias is None else bias.shape),
        weight.new_empty(0 if rate is None else (2, *rate.shape), dtype=torch.float32),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    count = len(_Inputs._fields)
    ctx.save_for_backward(*inputs[:count])
    ctx.layout = inputs[count:]
    ctx.shapes = [(made.shape, made.dtype) for made in output]
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, d_outputs: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    given = _Inputs(*ctx.saved_tensors)
    shaped = zip(d_outputs, ctx.shapes, strict=True)
    d_outputs = [
        given.slots.new_zeros(shape, dtype=dtype) if d is None else d.contiguous() for d, (shape, dtype) in shaped
    ]
    d_slots, d_weight, d_tokens, d_bias, d_gates = _slot_convs_backward(d_outputs, *given, *ctx.layout)
    d_rate = d_shift = None
    if given.rate is not None and given.shift is not None:
        d_shift, d_rate = (d.to(x.dtype) for d, x in zip(d_gates.unbind(), (given.shift, given.rate), strict=True))
    return (
        d_slots, None if given.tokens is None else d_tokens, d_weight, None if given.bias is None else d_bias, d_rate,
        d_shift, *(None,) * (4 + len(ctx.layout)),
    )  # fmt: skip


differentiable(_slot_convs, _keep, _gradients)


def slot_convs(
    slots: Tensor,
    parts: Sequence[Part],
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    *,
    tokens: Tensor | None = None,
    token_part: Part | None = None,
    source: Tensor | None = None,
    place: Tensor | None = None,
    segment: Tensor | None = None,
    gates: GateColumns | None = None,
    rate: Tensor | None = None,
    shift: Tensor | None = None,
) -> Mixed:
    """`slot_conv` of ranges of columns of the slots' projection and of the tokens' one, and gates, without carried inputs.

    Args:
        slots: `[R, C_x]`, a row a slot. `parts` are its first columns, one after another, a part at least.
        parts: their channels, with that of the tokens, are all of the weight, each once.
        weight: `[C, W]`.
        bias: `[C]` or None.
        cu_seqlens: `[N + 1]` int64 borders of the slots' segments.
        tokens: `[S, width]`, a row a token, or None.
        token_part: how all columns of `tokens` are convolved.
        source: `[R]` int64 the token that each slot reads; None: slot r reads row r.
        place: `[S, F]` int64 the inverse, as `slot_conv` takes it.
        segment: `[R]` int32, what `segment_of_slots` makes.
        gates: where the rest of the slots' columns is what gates are made of; None: it comes out as it is.
        rate: `[H]` of the log decay, -exp(rate) softplus(x + shift); None without one.
        shift: `[H]`.

    Returns:
        Differentiable in slots, tokens, weight, bias, rate and shift; the same input gives the same bits.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    _check(slots, parts, weight, bias, cu_seqlens, tokens, token_part, source, place, segment, gates, rate, shift)
    every = [*parts] if token_part is None else [*parts, token_part]
    decay, strength, heads, largest = (None, None, 0, 1.0) if gates is None else gates
    *made, log_decay, beta, rest = _slot_convs(
        side_by_side(slots),
        None if tokens is None else side_by_side(tokens),
        weight.contiguous(),
        *(None if x is None else x.contiguous() for x in (bias, rate, shift)),
        cu_seqlens.contiguous(),
        segment_of_slots(cu_seqlens, slots.shape[0]) if segment is None else segment,
        *(None if x is None else x.contiguous() for x in (source, place)),
        [part.width for part in every],
        [part.norm_heads or 0 for part in every],
        [part.first_channel for part in every],
        [part.activation == "silu" for part in every],
        -1 if decay is None else decay,
        -1 if strength is None else strength,
        heads,
        largest,
    )
    return Mixed(made, None if decay is None else log_decay, None if strength is None else beta, rest)


def _check(
    slots: Tensor, parts: Sequence[Part], weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor, tokens: Tensor | None,
    token_part: Part | None, source: Tensor | None, place: Tensor | None, segment: Tensor | None,
    gates: GateColumns | None, rate: Tensor | None, shift: Tensor | None,
) -> None:  # fmt: skip
    """Raise ValueError for arguments of `slot_convs` that do not fit."""
    used = sum(part.width for part in parts)
    if not parts or min(part.width for part in parts) < 1:
        raise ValueError(f"parts must be of a column at least, and one at least, got widths {[p.width for p in parts]}")
    if slots.dim() != 2 or slots.shape[1] < used:
        raise ValueError(f"slots must be [R, {used} or more], as parts add up to, got shape {list(slots.shape)}")
    if (tokens is None) != (token_part is None):
        raise ValueError("tokens and token_part must be given together")
    every = [*parts] if token_part is None else [*parts, token_part]
    # As one convolution, of what is the same for all parts.
    check_slot_conv(
        slots[:, :1].expand(-1, weight.shape[0]), weight, bias, cu_seqlens, None, None, segment, None, None, None
    )
    for part in every:
        if part.activation not in ACTIVATIONS:
            raise ValueError(f'activation of a part must be None or "silu", got {part.activation!r}')
        head = part.norm_heads
        if head is not None and (not 1 <= head <= kernels.LARGEST_HEAD or part.width % head):
            raise ValueError(
                f"norm_heads of a part must be a divisor of its width {part.width}, at most {kernels.LARGEST_HEAD}, or "
                f"None, got {head}"
            )
    channels = sorted((part.first_channel, part.first_channel + part.width) for part in every)
    ends = [0, *(end for _, end in channels)]
    if [first for first, _ in channels] != ends[:-1] or ends[-1] != weight.shape[0]:
        raise ValueError(f"parts must be all {weight.shape[0]} channels of the weight, each once, got {channels}")
    if tokens is not None and token_part is not None:
        rows = slots.shape[0] if source is None else tokens.shape[0]
        check_tensor("tokens", tokens, (rows, token_part.width), "[S, width]", (slots.dtype,), slots.device)
        if source is not None:
            check_tensor("source", source, (slots.shape[0],), "[R]", (torch.int64,), slots.device)
            if place is None:
                raise ValueError("place must be given where tokens are read through a source, got None")
            check_tensor("place", place, (rows, *place.shape[1:]), "[S, F]", (torch.int64,), slots.device)
    if gates is not None:
        firsts = [first for first in (gates.decay, gates.strength) if first is not None]
        if sorted(firsts) != [used + n * gates.heads for n in range(len(firsts))] or not firsts:
            raise ValueError(f"gates must be of the columns from {used} on, side by side, got {gates}")
        if slots.shape[1] != used + len(firsts) * gates.heads:
            raise ValueError(f"gates must be all {slots.shape[1] - used} columns behind the parts, got {gates}")
        if gates.decay is not None:
            for name, x in (("rate", rate), ("shift", shift)):
                if x is None:
                    raise ValueError(f"{name} must be given for a log decay, got None")
                check_tensor(name, x, (gates.heads,), "[H]", FLOATS, slots.device)
