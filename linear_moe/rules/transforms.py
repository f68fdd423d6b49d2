"""What queries and keys go through before the recurrence: l2 norm, rotary positions, feature maps."""

from __future__ import annotations

from collections.abc import Callable

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
    half = x.shape[-1] // 2
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    frequency = base ** (-torch.arange(half, device=x.device, dtype=dtype) / half)
    angle = positions.to(dtype)[..., None, None] * frequency
    first, second = upcast(x).chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1).to(x.dtype)


FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "elu": lambda x: F.elu(x) + 1,
}
"""Maps by name; `elu` is elu(x) + 1 of 2006.16236, section 3.2.1."""
