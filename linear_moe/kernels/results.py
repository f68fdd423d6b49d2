"""What the scans without erase return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Forward(NamedTuple):
    """What a forward pass makes."""

    output: Tensor
    """`[S, H, V]` in the dtype of v."""
    final_state: Tensor | None
    """`[N, H, K, V]` float32, if wanted."""
    starts: Tensor | None
    """`[P, H, K, V]`, the states that the backward pass starts from again, if there are any."""
    sums: Tensor | None
    """`[H, S]`, the sums of scalar log decays, if both passes take the same."""


class Backward(NamedTuple):
    """The gradients, each in the dtype of its input."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    """Of a decay that is no constant, if wanted."""
    initial_state: Tensor | None
