"""The causal depthwise convolution along each segment of a ragged input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.rules.base import upcast


def short_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y_t = bias + sum_w weight[:, w] x_{t - W + 1 + w}, never across a segment's border.

    Args:
        x: `[S, C]`, segments one after another.
        weight: `[C, W]`, the last column on the token itself.
        bias: `[C]` or None.
        cu_seqlens: `[N + 1]` borders of the segments. Tokens past the last are in none; their output is 0.
        state: `[N, W, C]` the last W inputs of each segment before this call, zeros if None.

    Returns:
        `[S, C]` in the dtype of x, and the new state `[N, W, C]`. A segment without tokens keeps its state, bit for bit.
    """
    num_segments, width = cu_seqlens.numel() - 1, weight.shape[1]
    if state is None:
        state = x.new_zeros(num_segments, width, x.shape[1])
    if x.shape[0] == 0:
        return x, state.clone()
    # Each segment's carried inputs and its own laid end to end, so that a tap is one gather, whichever side it falls on.
    history = torch.cat((state.flatten(0, 1).to(x.dtype), x))
    places = torch.arange(x.shape[0], device=x.device)
    segment = torch.searchsorted(cu_seqlens[1:], places, right=True)
    inside = segment < num_segments
    segment = segment.clamp_max(num_segments - 1)
    position = places - cu_seqlens[segment]

    weight = upcast(weight)
    total = torch.zeros_like(x, dtype=weight.dtype) if bias is None else upcast(bias).expand_as(x)
    for tap in range(width):
        shift = width - 1 - tap
        source = _history_index(segment, position - shift, cu_seqlens, width)
        total = total + history.index_select(0, torch.where(inside, source, 0)) * weight[:, tap]
    total = torch.where(inside[:, None], total, 0).to(x.dtype)

    ends = cu_seqlens.diff()[:, None] - width + torch.arange(width, device=x.device)
    owner = torch.arange(num_segments, device=x.device)[:, None].expand_as(ends)
    carried = _history_index(owner, ends, cu_seqlens, width).flatten()
    new_state = history.index_select(0, carried).unflatten(0, (num_segments, width))
    # A state that is wider than this call's inputs must not be rounded where nothing came in.
    came = (cu_seqlens.diff() > 0)[:, None, None]
    return total, torch.where(came, new_state.to(state.dtype), state)


def _history_index(segment: Tensor, position: Tensor, cu_seqlens: Tensor, width: int) -> Tensor:
    """Where in the history the input at `position` of a segment lies; positions below 0 are in the carried state."""
    carried = segment * width + width + position
    own = (cu_seqlens.numel() - 1) * width + cu_seqlens[segment] + position
    return torch.where(position < 0, carried, own)


def activate(x: Tensor, activation: str | None) -> Tensor:
    """None or "silu"."""
    return F.silu(x) if activation == "silu" else x
