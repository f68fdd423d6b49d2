"""What every layer asks of the input and the state that it is called with."""

from __future__ import annotations

import torch
from torch import Tensor

from linear_moe.layers.attention_state import AttentionState
from linear_moe.layers.projections import autocasting
from linear_moe.layers.state import MemoryState
from linear_moe.rules.looks import may_look


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


def check_length(
    limit: int | None, owner: str, lengths: Tensor | None, length: int, tokens_seen: Tensor | None
) -> None:
    """Raise if a sequence would have more than `limit` tokens, with those seen before.

    Where a look at tensors is not free, on a GPU, only what is known without one is held against the limit.

    Args:
        limit: None for none.
        owner: whose limit, for the message.
        lengths: `[B]` real tokens of each sequence in this call; None where each has `length`.
        length: tokens of a row.
        tokens_seen: `[B]` before this call, or None.
    """
    if limit is None:
        return
    longest = length if lengths is None else 0
    tensors = [x for x in (lengths, tokens_seen) if x is not None]
    if tensors and all(may_look(x.device) for x in tensors):
        totals = sum(tensors[1:], tensors[0]) + (length if lengths is None else 0)
        longest = int(totals.max()) if totals.numel() else 0
    if longest > limit:
        raise ValueError(
            f"{owner} takes sequences of at most max_length = {limit} tokens, got one of {longest}, those before this call "
            "counted: give a shorter text or prompt"
        )
