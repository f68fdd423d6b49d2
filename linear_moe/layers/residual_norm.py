"""The norm that a block's mixer and feed-forward read, and the addition to the residual stream before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linear_moe.layers.kernel_steps import LARGEST_NORM, kernels_run
from linear_moe.layers.projections import autocast_dtype


class ResidualNorm(nn.RMSNorm):
    """RMSNorm of the residual stream (1910.07467), to which the branch before is added first.

    A norm reads all of the stream, so that an addition made with it costs no pass of its own, forward or backward.

    Args:
        hidden_size: D.
        eps: added to the mean square.
        impl: "auto" or "triton" to have both made by one kernel where it runs, as for the memory layers; any other name for
            PyTorch. By the kernel the normed tensor is in autocast's dtype, in which whatever follows would round it.
        device: of the weight.
        dtype: of the weight.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float,
        *,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, eps, device=device, dtype=dtype)
        self.impl = impl

    def forward(self, residual: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """The stream with `branch` added, if there is one, and its norm: both `[..., D]`, as `residual` and `branch` are."""
        if kernels_run(residual, self.impl) and residual.shape[-1] <= LARGEST_NORM:
            from linear_moe.kernels.block_parts import add_and_norm

            assert self.eps is not None
            return add_and_norm(residual, branch, self.weight, eps=self.eps, dtype=autocast_dtype(residual))
        summed = residual if branch is None else residual + branch
        return summed, super().forward(summed)
