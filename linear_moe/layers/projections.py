"""Linear maps of a layer's tokens: one matrix for all memories, or one a memory by a grouped matmul."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def xavier_init_(weight: Tensor, gain: float = 2**-2.5) -> None:
    """Xavier uniform for each matrix of a stack `[..., out, in]`: the fan is a matrix's, not the stack's."""
    fan_out, fan_in = weight.shape[-2:]
    bound = gain * (6 / (fan_in + fan_out)) ** 0.5
    with torch.no_grad():
        weight.uniform_(-bound, bound)


def autocasting(device: torch.device) -> bool:
    """Whether autocast is on for this device; the meta device has none to ask for."""
    # Torch's own question, whether a device has it, is not traced by all of its compilers.
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype a matmul of `x` runs in: autocast's if it is on."""
    if x.dtype != torch.float64 and autocasting(x.device):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def grouped_linear(
    x: Tensor, weight: Tensor, cu_groups: Tensor, *, bias: Tensor | None = None, covered: bool = False
) -> Tensor:
    """Each row of `x` times the matrix of its group, plus its bias.

    Args:
        x: `[S, I]`, rows sorted by group.
        weight: `[G, O, I]`.
        bias: `[G, O]` or None.
        cu_groups: `[G + 1]` where each group's rows begin; rows past the last border get 0, and give no gradient.
        covered: whether it is known that there are none.

    Returns:
        `[S, O]`. Groups without rows get a gradient of 0.
    """
    dtype = autocast_dtype(x)
    x, weight = x.to(dtype), weight.to(dtype)
    if bias is not None:
        # A column of the matrix for inputs that are 1: looked up by group, its gradient would be a sum over rows by an index.
        width = _aligned_length(1, x)
        x = torch.cat([x, x.new_ones(x.shape[0], width)], -1)
        weight = torch.cat([weight, F.pad(bias.to(dtype)[..., None], (0, width - 1))], -1)
    taken = _grouped_mm_takes(x, weight)
    if taken:
        # Rows of a range of a projection's columns begin anywhere, and one row is contiguous wherever it begins.
        x = x.contiguous() if x.shape[0] > 1 else x.clone()
    if covered and taken:
        return F.grouped_mm(x, weight.mT, offs=cu_groups[1:].to(torch.int32))
    rows = torch.arange(x.shape[0], device=x.device)
    inside = (rows < cu_groups[-1])[:, None]
    # Both sides: what lies past the last group may be anything, in the product and in its gradient.
    x = torch.where(inside, x, 0)
    if taken:
        product = F.grouped_mm(x, weight.mT, offs=cu_groups[1:].to(torch.int32))
    else:
        group = torch.searchsorted(cu_groups[1:].contiguous(), rows, right=True).clamp_max(weight.shape[0] - 1)
        # Every matrix on every row, then each row's own: static sizes, at the price of G times the arithmetic.
        product = torch.einsum("si,goi->sgo", x, weight)[rows, group]
    return torch.where(inside, product, 0)


ALIGNMENT = 16
"""Bytes, of the rows that torch's grouped matmul takes."""


class Routes(NamedTuple):
    """Where slots find their tokens, where every slot belongs to a group."""

    ends: Tensor
    """`[G]` int32 where each group's slots end."""
    source: Tensor
    """`[R]` the token of each slot, sorted by group."""
    place: Tensor
    """`[S, F]` the inverse: the slots of each token, negative for none."""
    shared: bool = False
    """Whether it is known that the last group has every token, in order, and as the last of its slots."""


class Products(NamedTuple):
    """A call's tokens times the matrices that it has for them; None without the matrix."""

    slots: Tensor | None
    """`[R, O]`"""
    tokens: Tensor | None
    """`[S, O]`"""
    gate: Tensor | None
    """`[S, O]`"""


class _Project(torch.autograd.Function):
    """All products of the same tokens: the tokens' gradients are added up where they are made, not in passes of their own.

    The gathered rows, as large as k and v together, are not kept: a kernel reads them through the index, and torch's products
    of the backward pass gather them again.
    """

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, of_slots: Tensor | None, of_tokens: Tensor | None, of_gate: Tensor | None,
        ends: Tensor | None, source: Tensor | None, place: Tensor | None, shared: bool,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        from linear_moe.kernels.mixing import routed_product

        ctx.save_for_backward(tokens, of_slots, of_tokens, of_gate, ends, source, place)
        ctx.shared = shared
        ctx.set_materialize_grads(False)
        slots = None
        if of_slots is not None and source is None:
            slots = F.linear(tokens, of_slots.squeeze(0))
        elif of_slots is not None and source is not None:
            # The interpreter multiplies no tiles of 16 bits.
            if tokens.is_cuda or tokens.dtype == torch.float32:
                slots = routed_product(tokens, source, of_slots, ends)
            else:
                slots = F.grouped_mm(tokens.index_select(0, source), of_slots.mT, offs=ends)
        return slots, *(None if weight is None else F.linear(tokens, weight) for weight in (of_tokens, of_gate))

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_slots: Tensor | None, d_made: Tensor | None, d_gate: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        from linear_moe.kernels.mixing import sum_slots

        tokens, of_slots, of_tokens, of_gate, ends, source, place = ctx.saved_tensors
        wants_tokens, wants_slots, *wants_others = ctx.needs_input_grad[:4]
        d_tokens = None
        if d_slots is not None and not _rows_are_aligned(d_slots):
            d_slots = _aligned_rows(d_slots)

        def add(gradient: Tensor, weight: Tensor) -> Tensor:
            return gradient @ weight if d_tokens is None else d_tokens.addmm_(gradient, weight)

        d_others: list[Tensor | None] = [None, None]
        for n, (gradient, weight) in enumerate(((d_made, of_tokens), (d_gate, of_gate))):
            if gradient is not None:
                d_others[n] = gradient.mT @ tokens if wants_others[n] else None
                d_tokens = add(gradient, weight) if wants_tokens else None
        d_weight = None
        if d_slots is None:
            pass
        elif source is None:
            d_weight = (d_slots.mT @ tokens)[None] if wants_slots else None
            d_tokens = add(d_slots, of_slots.squeeze(0)) if wants_tokens else None
        else:
            if wants_slots:
                d_weight = F.grouped_mm(d_slots.mT, tokens.index_select(0, source), offs=ends)
            if wants_tokens:
                if ctx.shared:
                    # The product of the group of all tokens is dense, and its rows are the tokens'.
                    d_slots, of_all = d_slots.split([source.shape[0] - tokens.shape[0], tokens.shape[0]])
                    d_tokens = add(of_all, of_slots[-1])
                    of_slots, ends, place = of_slots[:-1], ends[:-1], place[:, :-1]
                added = [] if d_tokens is None else [d_tokens]
                d_tokens = sum_slots(F.grouped_mm(d_slots, of_slots, offs=ends), place, added)
        return d_tokens, d_weight, *d_others, None, None, None, None


def _rows_are_aligned(x: Tensor) -> bool:
    """Whether rows are whole and begin at multiples of 16 bytes, which they may lie apart by more than their length."""
    return x.stride(1) == 1 and x.stride(0) >= x.shape[1] and x.stride(0) * x.element_size() % ALIGNMENT == 0


def _aligned_rows(x: Tensor) -> Tensor:
    """The same rows, of which each begins at a multiple of 16 bytes."""
    room = x.new_empty(x.shape[0], _aligned_length(x.shape[1], x))[:, : x.shape[1]]
    return room.copy_(x)


def _aligned_length(length: int, x: Tensor) -> int:
    """At least so many numbers of `x`'s dtype, of which rows of so many begin at multiples of 16 bytes."""
    apart = ALIGNMENT // x.element_size()
    return -(-length // apart) * apart


def routes_are_taken(tokens: Tensor, weight: Tensor) -> bool:
    """Whether `project` takes slots that are routed, of `tokens` `[S, I]` and `weight` `[G, O, I]`."""
    return _grouped_mm_has(tokens, weight, autocast_dtype(tokens), weight.shape[-1:])


def project(
    tokens: Tensor, of_slots: Tensor | None, of_tokens: Tensor | None, of_gate: Tensor | None, routes: Routes | None
) -> Products:
    """The products of a call's tokens, in the dtype that a matmul of them runs in.

    Args:
        tokens: `[S, I]`.
        of_slots: `[G, O, I]` a matrix a group of slots, or None. `routes_are_taken`, or G = 1 and no routes.
        of_tokens: `[O, I]` one for every token, or None.
        of_gate: likewise.
        routes: None where slot s is token s.
    """
    dtype = autocast_dtype(tokens)
    weights = (None if weight is None else weight.to(dtype).contiguous() for weight in (of_slots, of_tokens, of_gate))
    ends = source = place = None
    shared = False
    if routes is not None and of_slots is not None:
        ends, source, place, shared = routes
        # With no other group there is nothing to route.
        shared = shared and of_slots.shape[0] > 1
    made = _Project.apply(tokens.to(dtype).contiguous(), *weights, ends, source, place, shared)
    return Products(*made)


def _grouped_mm_takes(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's grouped matmul has this case and its gradients'."""
    return _grouped_mm_has(x, weight, x.dtype, weight.shape[1:])


def _grouped_mm_has(x: Tensor, weight: Tensor, dtype: torch.dtype, strides: Sequence[int]) -> bool:
    """Whether torch's grouped matmul has this case: no float64, and row strides in multiples of 16 bytes."""
    if x.shape[0] == 0 or weight.shape[1] == 0:
        return False
    aligned = all(stride * dtype.itemsize % ALIGNMENT == 0 for stride in strides)
    # Of float32 a CPU's has the product, but not the shapes that a trace asks for.
    wide = not x.is_cuda and not torch.compiler.is_compiling()
    dtypes = (torch.float32, torch.bfloat16) if wide else (torch.bfloat16,)
    return aligned and dtype in dtypes and x.device.type in ("cpu", "cuda")


def plain_linear(module: nn.Module | None) -> nn.Linear | None:
    """A module that is its weight and nothing else, or None: adapters and hooks want to be called, and what has put a `forward`
    of its own into a module may keep the weight elsewhere until then.
    """
    if type(module) is not nn.Linear or getattr(module, "bias", None) is not None or "forward" in vars(module):
        return None
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return None if any(hooks) else module
