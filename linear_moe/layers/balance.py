"""Balancing a router: the auxiliary losses, the loads, and the selection bias that balances without a loss."""

from __future__ import annotations

import torch
from torch import Tensor

from linear_moe.layers.precision import KeepsFloat32


def load_fractions(indices: Tensor, num_choices: int, valid: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Fraction of the routed slots that each choice got, pads left out.

    Args:
        indices: `[S, k]` picked choices.
        num_choices: M.
        valid: `[S]` bool, true on real tokens.
        dtype: of the result.

    Returns:
        `[M]`, summing to 1 (all 0 without a real token).
    """
    choices = torch.arange(num_choices, device=indices.device)
    picked = (indices[..., None] == choices) & valid[:, None, None]
    counts = picked.sum((0, 1)).to(dtype)
    return counts / counts.sum().clamp_min(1)


def balance_loss(probabilities: Tensor, load: Tensor, valid: Tensor) -> Tensor:
    """M * sum_m f_m P_m (Switch Transformer, 2101.03961, eq. 4 - 6, for top-k): 1 at balance, pads left out.

    Args:
        probabilities: `[S, M]` scores normalised to sum 1 over the choices.
        load: `[M]` f, from `load_fractions`. No gradient flows through it.
        valid: `[S]` bool.

    Returns:
        A scalar in the dtype of `probabilities`.
    """
    kept = torch.where(valid[:, None], probabilities, 0)
    mean = kept.sum(0) / valid.sum().clamp_min(1)
    return probabilities.shape[-1] * (load.to(mean.dtype) * mean).sum()


def z_loss(logits: Tensor, valid: Tensor) -> Tensor:
    """Mean over real tokens of logsumexp(logits)^2 (ST-MoE, 2202.08906, eq. 5): keeps the logits small."""
    squared = torch.where(valid, torch.logsumexp(logits, -1).square(), 0)
    return squared.sum() / valid.sum().clamp_min(1)


class BalanceBias(KeepsFloat32):
    """A bias on the scores, for selection only, that rises for choices with too little load (2408.15664, algorithm 1).

    The loads of every training forward are summed; `update_balance_bias`, called once an optimiser step, moves each bias
    by `rate` against the sign of its excess load.
    """

    bias: Tensor
    pending: Tensor

    def __init__(self, num_choices: int, rate: float) -> None:
        super().__init__()
        self.rate = rate
        # Whatever the default dtype is: a model may be built under a 16-bit one.
        self.register_buffer("bias", torch.zeros(num_choices, dtype=torch.float32))
        self.register_buffer("pending", torch.zeros(num_choices, dtype=torch.float32), persistent=False)

    def reset_parameters(self) -> None:
        """No bias, no loads."""
        self.bias.zero_()
        self.pending.zero_()

    def forward(self, scores: Tensor) -> Tensor:
        """Scores for selection."""
        return scores + self.bias.to(scores.dtype)

    @torch.no_grad()
    def observe(self, load: Tensor) -> None:
        """Add the loads of a training forward."""
        self.pending += load

    @torch.no_grad()
    def update_balance_bias(self) -> None:
        """Move the bias by the loads since the last update."""
        self.bias += self.rate * torch.sign(self.pending.mean() - self.pending)
        self.pending.zero_()

    def extra_repr(self) -> str:
        return f"rate={self.rate}"
