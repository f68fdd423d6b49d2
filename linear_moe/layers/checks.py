"""What every layer asks of the input and the state that it is called with."""

from __future__ import annotations

import torch
from torch import Tensor

from linear_moe.layers.attention_state import AttentionState
from linear_moe.layers.projections import autocasting
from linear_moe.layers.state import MemoryState


def check_input(x: Tensor, hidden_size: int, dtype: torch.dtype) -> None:
    """Raise unless `x` is `[B, T, hidden_size]` in the layer's `dtype`, or in any under autocast."""
    if x.dim() != 3:
        raise ValueError(f"x must be [B, T, D], got shape {tuple(x.shape)}")
    if x.shape[-1] != hidden_size:
        raise ValueError(f"x must have hidden_size = {hidden_size} channels, got shape {list(x.shape)}")
    if x.dtype != dtype and not autocasting(x.device):
        raise ValueError(f"x must have the layer's dtype, {dtype}, got {x.dtype}")


def check_state(state: MemoryState | AttentionState, kind: type, owner: str) -> None:
    """Raise unless `state` is of the class `kind` and of the layer that calls itself `owner`; its sizes are left to that."""
    if not isinstance(state, kind):
        raise ValueError(f"state must be one of class {kind.__name__}, from new_state, got {type(state).__name__}")
    if state.owner != owner:
        raise ValueError(f"state belongs to {state.owner}, this is {owner}")
