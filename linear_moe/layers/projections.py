"""Linear maps of a layer's tokens: one matrix for all memories, or one a memory by a grouped matmul."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
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


def grouped_linear(x: Tensor, weight: Tensor, cu_groups: Tensor, *, covered: bool = False) -> Tensor:
    """Each row of `x` times the matrix of its group.

    Args:
        x: `[S, I]`, rows sorted by group.
        weight: `[G, O, I]`.
        cu_groups: `[G + 1]` where each group's rows begin; rows past the last border get 0, and give no gradient.
        covered: whether it is known that there are none.

    Returns:
        `[S, O]`. Groups without rows get a gradient of 0.
    """
    dtype = autocast_dtype(x)
    x, weight = x.to(dtype), weight.to(dtype)
    if covered and _grouped_mm_takes(x, weight):
        return F.grouped_mm(x, weight.mT, offs=cu_groups[1:].to(torch.int32))
    rows = torch.arange(x.shape[0], device=x.device)
    inside = (rows < cu_groups[-1])[:, None]
    # Both sides: what lies past the last group may be anything, in the product and in its gradient.
    x = torch.where(inside, x, 0)
    if _grouped_mm_takes(x, weight):
        product = F.grouped_mm(x, weight.mT, offs=cu_groups[1:].to(torch.int32))
    else:
        group = torch.searchsorted(cu_groups[1:].contiguous(), rows, right=True).clamp_max(weight.shape[0] - 1)
        # Every matrix on every row, then each row's own: static sizes, at the price of G times the arithmetic.
        product = torch.einsum("si,goi->sgo", x, weight)[rows, group]
    return torch.where(inside, product, 0)


class _RoutedLinear(torch.autograd.Function):
    """The tokens come out twice more: what their other uses send back is added where the slots' gradients are summed.

    The gathered rows, as large as k and v together, are not kept: a kernel reads them through the index, and torch's products
    of the backward pass gather them again.
    """

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, weight: Tensor, ends: Tensor, source: Tensor, place: Tensor, shared: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        from linear_moe.kernels.mixing import routed_product

        ctx.save_for_backward(tokens, weight, ends, source, place)
        ctx.shared = shared
        ctx.set_materialize_grads(False)
        # The interpreter multiplies no tiles of 16 bits.
        if tokens.is_cuda or tokens.dtype == torch.float32:
            product = routed_product(tokens, source, weight, ends)
        else:
            product = F.grouped_mm(tokens.index_select(0, source), weight.mT, offs=ends)
        again, once_more = tokens.view_as(tokens), tokens.view_as(tokens)
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(again, once_more)
        return product, again, once_more

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, *of_others: Tensor | None) -> tuple[Tensor | None, ...]:
        from linear_moe.kernels.mixing import sum_slots

        tokens, weight, ends, source, place = ctx.saved_tensors
        if gradient is None:
            gradient = tokens.new_zeros(source.shape[0], weight.shape[1])
        if not _rows_are_aligned(gradient):
            gradient = gradient.contiguous()
        wants_tokens, wants_weight, *_ = ctx.needs_input_grad
        of_tokens = of_weight = None
        addends = [each.contiguous() for each in of_others if each is not None]
        if wants_weight:
            of_weight = F.grouped_mm(gradient.mT, tokens.index_select(0, source), offs=ends)
        if wants_tokens:
            if ctx.shared:
                # The product of the group of all tokens is dense, and its rows are the tokens'.
                gradient, of_all = gradient.split([source.shape[0] - tokens.shape[0], tokens.shape[0]])
                addends.append(of_all @ weight[-1])
                weight, ends, place = weight[:-1], ends[:-1], place[:, :-1]
            of_tokens = sum_slots(F.grouped_mm(gradient, weight, offs=ends), place, addends)
        return of_tokens, of_weight, None, None, None, None


def _rows_are_aligned(x: Tensor) -> bool:
    """Whether rows are whole and begin at multiples of 16 bytes, which they may lie apart by more than their length."""
    return x.stride(1) == 1 and x.stride(0) >= x.shape[1] and x.stride(0) * x.element_size() % 16 == 0


def routed_linear(
    tokens: Tensor, weight: Tensor, ends: Tensor, source: Tensor, place: Tensor, *, shared: bool = False
) -> tuple[Tensor, Tensor, Tensor] | None:
    """`grouped_linear` of the tokens that slots are routed to, where every slot belongs to a group.

    Args:
        tokens: `[S, I]`.
        weight: `[G, O, I]`.
        ends: `[G]` int32 where each group's slots end.
        source: `[R]` the token of each slot, sorted by group.
        place: `[S, F]` the inverse: the slots of each token.
        shared: whether it is known that the last group has every token, in order, and as the last of its slots.

    Returns:
        `[R, O]`, and twice the tokens, for two other uses, in the dtype of the product: so the gradients of all are added up in
        one pass. None where torch's grouped matmul does not take the case.
    """
    dtype = autocast_dtype(tokens)
    tokens, weight = tokens.to(dtype), weight.to(dtype)
    if not _grouped_mm_takes(tokens, weight):
        return None
    # With no other group there is nothing to route.
    shared = shared and weight.shape[0] > 1
    made: tuple[Tensor, Tensor, Tensor] = _RoutedLinear.apply(
        tokens.contiguous(), weight.contiguous(), ends, source, place, shared
    )
    return made


def _grouped_mm_takes(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's grouped matmul has this case: no float64, and row strides in multiples of 16 bytes."""
    if x.shape[0] == 0 or weight.shape[1] == 0:
        return False
    aligned = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
    # Of float32 a CPU's has the product, but not the shapes that a trace asks for.
    wide = not x.is_cuda and not torch.compiler.is_compiling()
    dtypes = (torch.float32, torch.bfloat16) if wide else (torch.bfloat16,)
    return aligned and x.dtype in dtypes and x.device.type in ("cpu", "cuda")
