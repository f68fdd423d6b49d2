"""The dense feed-forward of a block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linear_moe.layers.initialization import normal_init_
from linear_moe.layers.kernel_steps import kernels_run

WIDTH_MULTIPLE = 256
"""Widths from a ratio are rounded up to this, as in the published settings (LLaMA's code)."""
DEFAULT_RATIO = 4.0


def swiglu_width(hidden_size: int, ratio: float | None = None, width: int | None = None) -> int:
    """The inner width: as given, or 2/3 of `ratio * hidden_size` rounded up to a multiple of 256.

    2/3, because a gated unit has three matrices where a plain one of width `ratio * hidden_size` has two (2002.05202).

    Raises:
        ValueError: if both are given, or if either is not positive.
    """
    if ratio is not None and width is not None:
        raise ValueError(f"ratio and width were both given ({ratio} and {width}); pass one")
    if width is not None:
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        return width
    ratio = DEFAULT_RATIO if ratio is None else ratio
    if ratio <= 0:
        raise ValueError(f"ratio must be above 0, got {ratio}")
    return -(-int(hidden_size * ratio * 2 / 3) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def gated_unit(x: Tensor, *, kernel: bool) -> Tensor:
    """SiLU(gate) * up of `x` `[..., 2W]`, the gates in front: `[..., W]`, made by a kernel or by PyTorch."""
    if kernel:
        from linear_moe.kernels.block_parts import gated_unit as by_kernel

        return by_kernel(x)
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


class SwiGLU(nn.Module):
    """y = W_out (SiLU(W_gate x) * W_up x) (2002.05202, eq. 6): `[B, T, D]` to `[B, T, D]`.

    Args:
        hidden_size: D.
        ratio: the width of a plain feed-forward with as many parameters, over D; 4 if neither is given.
        width: the inner width itself, in place of `ratio`.
        impl: "auto" or "triton" for a kernel between the products where it runs, as for the memory layers; any other name for
            PyTorch.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: naming the argument that does not fit.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        ratio: float | None = None,
        width: int | None = None,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.width = swiglu_width(hidden_size, ratio, width)
        self.impl = impl
        # Gate and up in one matrix: one matmul.
        self.in_proj = nn.Linear(hidden_size, 2 * self.width, bias=False, device=device, dtype=dtype)
        self.out_proj = nn.Linear(self.width, hidden_size, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, 0.02)."""
        for projection in (self.in_proj, self.out_proj):
            normal_init_(projection.weight)

    def forward(self, x: Tensor, *, padding_mask: Tensor | None = None) -> Tensor:
        """`x` `[..., D]`. A token's output depends on it alone, so pads need no care and `padding_mask` is not read."""
        inner = gated_unit(self.in_proj(x), kernel=kernels_run(x, self.impl))
        output: Tensor = self.out_proj(inner)
        return output.to(x.dtype)

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, width={self.width}"
