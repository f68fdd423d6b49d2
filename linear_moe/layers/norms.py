"""The output norm and gate of a memory layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linear_moe.rules.base import upcast

OUTPUT_GATES: dict[str, Callable[[Tensor], Tensor] | None] = {"silu": F.silu, "sigmoid": torch.sigmoid, "none": None}
"""What the gate goes through, by name; "none" for no gate."""


class GatedRMSNorm(nn.Module):
    """RMSNorm of the reads, times an activation of a gate (2307.08621, eq. 8; the norm in float32).

    Each head is normed by itself with one weight for all, or groups of heads together with a weight a channel, as Mamba2 does
    (2405.21060, section 7.3). There the gate goes first: the product is normed.

    Args:
        num_heads: H.
        head_dim: V.
        eps: added to the mean square.
        gate: a name of `OUTPUT_GATES`.
        groups: how many parts the H * V channels are normed in; each head by itself with a shared weight if None.
        gate_first: norm what the gate has been multiplied with.

    Raises:
        ValueError: naming the argument that does not fit.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        eps: float = 1e-5,
        *,
        gate: str = "silu",
        groups: int | None = None,
        gate_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if gate not in OUTPUT_GATES:
            raise ValueError(f"output_gate must be one of {', '.join(OUTPUT_GATES)}, got {gate!r}")
        width = num_heads * head_dim
        if groups is not None and (groups < 1 or width % groups):
            raise ValueError(f"norm_groups must divide the {width} value channels, got {groups}")
        if gate_first and gate == "none":
            raise ValueError("gate_before_norm=True needs an output gate, got output_gate='none'")
        self.eps = eps
        self.gate = gate
        self.groups = groups
        self.gate_first = gate_first
        self.weight = nn.Parameter(torch.ones(head_dim if groups is None else width, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Ones."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, gate: Tensor | None, dtype: torch.dtype) -> Tensor:
        """`x` and `gate` `[..., H, V]`, no gate for "none"; the result `[..., H, V]` has the dtype asked for."""
        activation = OUTPUT_GATES[self.gate]
        factor = None if activation is None or gate is None else activation(upcast(gate))
        x = upcast(x)
        if factor is not None and self.gate_first:
            x, factor = x * factor, None
        weight = self.weight.to(x.dtype)
        if self.groups is None:
            normed = self._normalized(x) * weight
        else:
            parts = x.flatten(-2).unflatten(-1, (self.groups, -1))
            normed = (self._normalized(parts).flatten(-2) * weight).view(x.shape)
        return (normed if factor is None else normed * factor).to(dtype)

    def _normalized(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)

    def extra_repr(self) -> str:
        groups = "" if self.groups is None else f", groups={self.groups}"
        return f"{self.weight.shape[0]}, eps={self.eps}, gate={self.gate}{groups}" + (
            ", gate first" if self.gate_first else ""
        )
