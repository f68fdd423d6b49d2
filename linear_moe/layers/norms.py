"""The output norm of a memory layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linear_moe.rules.base import upcast


class GatedRMSNorm(nn.Module):
    """RMSNorm over a head's value channels, times SiLU of a gate (2307.08621, eq. 8; the norm in float32).

    Args:
        size: V.
        eps: added to the mean square.
    """

    def __init__(
        self, size: int, eps: float = 1e-5, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Ones."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """`x` and `gate` `[..., V]`; the result has the gate's dtype."""
        x, wide_gate = upcast(x), upcast(gate)
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight.to(x.dtype)
        return (normed * F.silu(wide_gate)).to(gate.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
