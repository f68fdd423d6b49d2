"""A mixture's steps as torch library operators: the plan of its slots, what a token reads from memories, and sums of its slots.

An operator takes and returns tensors and numbers. What is not made is an empty tensor there, None outside.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from linear_moe.kernels import combine, slot_plan, slot_sum
from linear_moe.kernels import routed_product as _routed_product
from linear_moe.kernels.blocks import new_rows
from linear_moe.kernels.compile_ahead import compile_ahead
from linear_moe.kernels.operator import FLOATS, check_tensor, differentiable, operator
from linear_moe.kernels.slot_plan import SlotPlan


@operator("slot_plan")
def _plan(
    memory: Tensor, sequence: Tensor, num_states: int, num_sequences: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    sort = functools.partial(slot_plan.sort, memory, sequence, num_states, num_sequences)
    with torch.cuda.device_of(memory):
        compile_ahead(memory.device, _plan, sort)
        return tuple(sort())  # type: ignore[return-value]


@torch.library.register_fake("linear_moe::slot_plan")
def _(memory, sequence, num_states, num_sequences):
    slots = memory.numel()
    long = (slots, slots, num_states * num_sequences + 1, num_states, slots)
    short = (slots, num_states)
    return tuple(
        memory.new_empty(size, dtype=dtype)
        for sizes, dtype in ((long, torch.int64), (short, torch.int32))
        for size in sizes
    )


def plan_slots(memory: Tensor, sequence: Tensor, num_states: int, num_sequences: int) -> SlotPlan:
    """Sort slots stably by (memory, sequence), and count them by memory. Nothing waits for the device.

    Slot s * F + f is token s's use of `memory[s, f]`. The sequences of the tokens that are no pads must not decrease, as those
    of rows and of packed documents never do: the plan is then that of a stable sort of `memory * num_sequences + sequence`
    with pads behind everything. That, and whether the memories are below `num_states`, is not looked at.

    Args:
        memory: `[S, F]` int64, from 0 to `num_states - 1`; of a pad, anything.
        sequence: `[S]` int64, from 0 to `num_sequences - 1`, or `num_sequences` for a pad. Pads may stand anywhere.
        num_states: memories.
        num_sequences: sequences. With B of them segment n = m * B + b.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    if memory.dim() != 2 or memory.shape[1] < 1:
        raise ValueError(f"memory must be [S, F] with F at least 1, got shape {list(memory.shape)}")
    if memory.numel() > slot_plan.MOST_SLOTS:
        raise ValueError(f"memory must have at most {slot_plan.MOST_SLOTS} slots, got {memory.numel()}")
    check_tensor("sequence", sequence, (memory.shape[0],), "[S]", (torch.int64,), memory.device)
    check_tensor("memory", memory, tuple(memory.shape), "[S, F]", (torch.int64,), memory.device)
    for name, value, least in (("num_states", num_states, 1), ("num_sequences", num_sequences, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    return SlotPlan(*_plan(memory.contiguous(), sequence.contiguous(), num_states, num_sequences))


@operator("combine")
def _combine(
    reads: Tensor, place: Tensor, weights: Tensor | None, gate: Tensor, norm_weight: Tensor, valid: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    with torch.cuda.device_of(gate):
        return combine.forward(reads, place, weights, gate, norm_weight, valid, eps)


@torch.library.register_fake("linear_moe::combine")
def _(reads, place, weights, gate, norm_weight, valid, eps):
    return gate.new_empty(gate.shape)


@operator("combine_backward")
def _combine_backward(
    d_output: Tensor, reads: Tensor, place: Tensor, weights: Tensor | None, gate: Tensor, norm_weight: Tensor,
    valid: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    with torch.cuda.device_of(gate):
        made = combine.backward(d_output, reads, place, weights, gate, norm_weight, valid, eps)
    none = gate.new_empty(0, dtype=torch.float32)
    return made.reads, none if made.weights is None else made.weights, made.gate, made.norm_weight


@torch.library.register_fake("linear_moe::combine_backward")
def _(d_output, reads, place, weights, gate, norm_weight, valid, eps):
    none = gate.new_empty(0, dtype=torch.float32)
    made = (reads, none if weights is None else weights, gate, norm_weight)
    return tuple(x.new_empty(x.shape) for x in made)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
    reads, place, weights, gate, norm_weight, valid = ctx.saved_tensors
    d_reads, d_weights, d_gate, d_norm_weight = _combine_backward(
        d_output.contiguous(), reads, place, weights, gate, norm_weight, valid, ctx.eps
    )
    return d_reads, None, None if weights is None else d_weights, d_gate, d_norm_weight, None, None


differentiable(_combine, _keep, _gradients)


def combine_reads(
    reads: Tensor,
    place: Tensor,
    weights: Tensor | None,
    gate: Tensor,
    norm_weight: Tensor,
    *,
    eps: float,
    valid: Tensor | None = None,
) -> Tensor:
    """y[s] = norm(sum_f weights[s, f] * reads[place[s * F + f]]) * silu(gate[s]), the norm over each head's channels.

    Args:
        reads: `[R, H, V]` float32, bfloat16 or float16 in the order of a plan, V up to 256.
        place: `[R]` int64: where each slot's read lies; R = S * F, each place once.
        weights: `[S, F]` float32, or None for 1.
        gate: `[S, H * V]` float32, bfloat16 or float16.
        norm_weight: `[V]` float32, bfloat16 or float16.
        eps: added to the mean square.
        valid: `[S]` bool, or None for all: a pad reads 0, whatever stands at its places, and gives no gradient.

    Returns:
        `[S, H * V]` in the dtype of the gate, made in float32. Differentiable in the reads, the weights, the gate and the
        norm's weight; the same input gives the same bits.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    if reads.dim() != 3 or not 1 <= reads.shape[2] <= combine.LARGEST_VALUE_DIM or reads.shape[1] < 1:
        raise ValueError(
            f"reads must be [R, H, V] with V from 1 to {combine.LARGEST_VALUE_DIM}, got shape {list(reads.shape)}"
        )
    slots, heads, value_dim = reads.shape
    tokens = gate.shape[0] if gate.dim() else 0
    fan_out = slots // max(tokens, 1)
    if slots != tokens * fan_out or bool(slots) != bool(tokens):
        raise ValueError(f"reads must have a row for each of F slots of the gate's {tokens} tokens, got {slots}")
    for name, tensor, shape, meaning, dtypes in (
        ("reads", reads, (slots, heads, value_dim), "[R, H, V]", FLOATS),
        ("place", place, (slots,), "[R]", (torch.int64,)),
        ("weights", weights, (tokens, fan_out) if tokens else None, "[S, F]", (torch.float32,)),
        ("gate", gate, (tokens, heads * value_dim), "[S, H * V]", FLOATS),
        ("norm_weight", norm_weight, (value_dim,), "[V]", FLOATS),
        ("valid", valid, (tokens,), "[S]", (torch.bool,)),
    ):
        if tensor is not None:
            check_tensor(name, tensor, shape, meaning, dtypes, reads.device)
    tensors = (reads, place, weights, gate, norm_weight, valid)
    output: Tensor = _combine(*(None if x is None else x.contiguous() for x in tensors), eps)
    return output


@operator("sum_slots")
def sum_slots(slots: Tensor, place: Tensor, addends: Sequence[Tensor]) -> Tensor:
    """Rows `[R, C]` summed in float32 over each token's places `[S, F]` in their order, but for negative ones: `[S, C]`.

    They are added to the addends `[S, C]`, three at most. Everything is contiguous, but for the places, which may be the first
    columns of more.
    """
    with torch.cuda.device_of(slots):
        return slot_sum.forward(slots, place, None, addends)


@torch.library.register_fake("linear_moe::sum_slots")
def _(slots, place, addends):
    return slots.new_empty(place.shape[0], slots.shape[1])


@operator("routed_product")
def routed_product(x: Tensor, source: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Row r is `x[source[r]]` times the matrix of its group: `[R, O]` of contiguous `x` `[S, I]` and `weight` `[G, O, I]`.

    `source` is `[R]`, sorted by group; `ends` `[G]` int32 says where each group's rows end, the last at R at most. Rows past it
    are anything. Those of the product may lie further apart than O.
    """
    with torch.cuda.device_of(x):
        return _routed_product.product(x, source, weight, ends)


@torch.library.register_fake("linear_moe::routed_product")
def _(x, source, weight, ends):
    return new_rows(x, source.shape[0], weight.shape[1])


@operator("weighted_sum")
def _weighted_sum(slots: Tensor, place: Tensor, weights: Tensor, addend: Tensor | None, dtype: torch.dtype) -> Tensor:
    with torch.cuda.device_of(slots):
        return slot_sum.forward(slots, place, weights, () if addend is None else (addend,), dtype=dtype)


@torch.library.register_fake("linear_moe::weighted_sum")
def _(slots, place, weights, addend, dtype):
    return slots.new_empty(place.shape[0], slots.shape[1], dtype=dtype)


@operator("weighted_sum_backward")
def _weighted_sum_backward(d_sum: Tensor, slots: Tensor, place: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(slots):
        return tuple(slot_sum.backward(d_sum, slots, place, weights))  # type: ignore[return-value]


@torch.library.register_fake("linear_moe::weighted_sum_backward")
def _(d_sum, slots, place, weights):
    return slots.new_empty(slots.shape), weights.new_empty(weights.shape)


def _keep_for_sum(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    slots, place, weights, addend, _ = inputs
    ctx.addend_dtype = None if addend is None else addend.dtype
    ctx.save_for_backward(slots, place, weights)


def _sum_gradients(ctx: Any, d_sum: Tensor) -> tuple[Tensor | None, ...]:
    d_slots, d_weights = _weighted_sum_backward(d_sum.contiguous(), *ctx.saved_tensors)
    return d_slots, None, d_weights, None if ctx.addend_dtype is None else d_sum.to(ctx.addend_dtype), None


differentiable(_weighted_sum, _keep_for_sum, _sum_gradients)


def weighted_sum(
    slots: Tensor, place: Tensor, weights: Tensor, *, addend: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """y[s] = addend[s] + sum_f weights[s, f] * slots[place[s * F + f]].

    Args:
        slots: `[R, C]` float32, bfloat16 or float16 in the order of a plan.
        place: `[R]` int64: where each slot lies; R = S * F, each place once.
        weights: `[S, F]` float32.
        addend: `[S, C]` float32, bfloat16 or float16, or None for nothing.
        dtype: of the result; that of the slots unless given.

    Returns:
        `[S, C]`, made in float32. Differentiable in the slots, the weights and the addend; the same input gives the same bits.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    if slots.dim() != 2:
        raise ValueError(f"slots must be [R, C], got shape {list(slots.shape)}")
    if weights.dim() != 2 or weights.numel() != slots.shape[0] or weights.shape[1] < 1:
        raise ValueError(
            f"weights must be [S, F] with one of each of the {slots.shape[0]} slots, got shape {list(weights.shape)}"
        )
    tokens, channels = weights.shape[0], slots.shape[1]
    for name, tensor, shape, meaning, dtypes in (
        ("slots", slots, tuple(slots.shape), "[R, C]", FLOATS),
        ("place", place, (slots.shape[0],), "[R]", (torch.int64,)),
        ("weights", weights, tuple(weights.shape), "[S, F]", (torch.float32,)),
        ("addend", addend, (tokens, channels), "[S, C]", FLOATS),
    ):
        if tensor is not None:
            check_tensor(name, tensor, shape, meaning, dtypes, slots.device)
    dtype = slots.dtype if dtype is None else dtype
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    output: Tensor = _weighted_sum(
        slots.contiguous(),
        place.contiguous().view(weights.shape),
        weights.contiguous(),
        None if addend is None else addend.contiguous(),
        dtype,
    )
    return output
