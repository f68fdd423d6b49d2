"""Linear maps of a layer's tokens: one matrix for all memories, or one a memory by a grouped matmul."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def xavier_init_(weight: Tensor, gain: float = 2**-2.5) -> None:
    """Xavier uniform for each matrix of a stack `[..., out, in]`: the fan is a matrix's, not the stack's."""
    fan_out, fan_in = weight.shape[-2:]
    bound = gain * (6 / (fan_in + fan_out)) ** 0.5
    with torch.no_grad():
        weight.uniform_(-bound, bound)


def autocasting(device: torch.device) -> bool:
    """Whether autocast is on for this device; the meta device has none to ask for."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


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
        group = torch.searchsorted(cu_groups[1:], rows, right=True).clamp_max(weight.shape[0] - 1)
        # Every matrix on every row, then each row's own: static sizes, at the price of G times the arithmetic.
        product = torch.einsum("si,goi->sgo", x, weight)[rows, group]
    return torch.where(inside, product, 0)


def _grouped_mm_takes(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's grouped matmul has this case: no float64, and row strides in multiples of 16 bytes."""
    if x.shape[0] == 0 or weight.shape[1] == 0:
        return False
    aligned = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
    # Of float32 a CPU's has the product, but not the shapes that a trace asks for.
    wide = not x.is_cuda and not torch.compiler.is_compiling()
    dtypes = (torch.float32, torch.bfloat16) if wide else (torch.bfloat16,)
    return aligned and x.dtype in dtypes and x.device.type in ("cpu", "cuda")
