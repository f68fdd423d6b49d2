"""What queries and keys go through before the recurrence: l2 norm, rotary positions, feature maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.rules.base import upcast

L2_EPS = 1e-6
"""Inside the square root, so that a zero vector (a pad, a dead feature) has the gradient of a small one, not NaN."""


def l2_norm(x: Tensor) -> Tensor:
    """`x / sqrt(sum(x^2) + 1e-6)` over the last dim, in float32, back in the dtype of `x`."""
    wide = upcast(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + L2_EPS)).to(x.dtype)


def rotary(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """Rotary position embedding (2104.09864, eq. 34), channels i and i + K/2 a pair.

    Args:
        x: `[..., H, K]`, K even.
        positions: `[...]` integer positions in the text.
        base: the longest wavelength over 2 pi.
    """
    return rotary_of(x, positions, base)(x)


def rotary_of(like: Tensor, positions: Tensor, base: float = 10000.0) -> Callable[[Tensor], Tensor]:
    """`rotary` at these positions, of several tensors `[..., H, K]` of the dtype and the K of one that they are `like`."""
    half = like.shape[-1] // 2
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    frequency = base ** (-torch.arange(half, device=like.device, dtype=dtype) / half)
    angle = positions.to(dtype)[..., None, None] * frequency
    cos, sin = angle.cos(), angle.sin()

    def rotate(x: Tensor) -> Tensor:
        rotated: Tensor = _Rotation.apply(x, cos, sin)
        return rotated

    return rotate


class _Rotation(torch.autograd.Function):
    """Pairs of channels turned by an angle. The gradient is turned back: nothing as large as x is kept for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(gradients[0], cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    turned = torch.empty_like(x, memory_format=torch.contiguous_format)
    # 16 bits times float32 is float32.
    one, other = turned.chunk(2, -1)
    one.copy_(first * cos - second * sin)
    other.copy_(first * sin + second * cos)
    return turned


FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "elu": lambda x: F.elu(x) + 1,
}
"""Maps by name; `elu` is elu(x) + 1 of 2006.16236, section 3.2.1."""
