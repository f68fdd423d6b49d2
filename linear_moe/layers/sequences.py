"""Which sequence each token belongs to, from a padding mask or from `cu_seqlens`: one description for every mixer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linear_moe.rules.validate import check_cu_seqlens, check_padding_mask
from linear_moe.static_tensors import static


@dataclass(frozen=True)
class Sequences:
    """The sequences of an input of B * T tokens, padded or packed. All tensors stay on the input's device."""

    num_sequences: int
    """B, or the number of packed documents."""
    max_length: int
    """A bound on the tokens of one sequence that no look at the data is needed for: T, or what the caller knows."""
    index: Tensor
    """`[B * T]` int64: the sequence of each token, `num_sequences` for a pad."""
    valid: Tensor
    """`[B * T]` bool: true on real tokens."""
    position: Tensor
    """`[B * T]` int64: real tokens of the same sequence before this one, in this call."""
    lengths: Tensor
    """`[num_sequences]` int64: real tokens of each sequence."""


def describe_sequences(
    x: Tensor, padding_mask: Tensor | None = None, cu_seqlens: Tensor | None = None, max_length: int | None = None
) -> Sequences:
    """Describe the sequences of `x` `[B, T, D]`.

    Args:
        x: the layer's input, `[B, T, D]`.
        padding_mask: `[B, T]` bool, true on real tokens. Pads may stand anywhere.
        cu_seqlens: `[N + 1]` int32 or int64, the documents' borders in a packed input with B = 1.
        max_length: with `cu_seqlens`, a bound on the tokens of a document; T unless given.

    Raises:
        ValueError: if both the mask and the borders are given, or if either, or the bound, does not fit `x`.
    """
    if x.dim() != 3:
        raise ValueError(f"x must be [B, T, D], got shape {tuple(x.shape)}")
    batch, length = x.shape[:2]
    if padding_mask is not None and cu_seqlens is not None:
        raise ValueError(
            "padding_mask and cu_seqlens were both given; pass one: a batch is padded or packed, never both"
        )
    if cu_seqlens is not None:
        return _packed(x, batch, length, cu_seqlens, max_length)
    if max_length is not None:
        raise ValueError("max_length is a bound on packed documents: it goes with cu_seqlens, which was not given")
    if padding_mask is not None:
        return _padded(x, batch, length, padding_mask)
    return _batch(batch, length, x.device)


@static
def _batch(batch: int, length: int, device: torch.device) -> Sequences:
    return Sequences(
        num_sequences=batch,
        max_length=length,
        index=torch.arange(batch, device=device).repeat_interleave(length),
        valid=torch.ones(batch * length, dtype=torch.bool, device=device),
        position=torch.arange(length, device=device).repeat(batch),
        lengths=torch.full((batch,), length, dtype=torch.int64, device=device),
    )


def _padded(x: Tensor, batch: int, length: int, padding_mask: Tensor) -> Sequences:
    check_padding_mask(padding_mask, batch, length)
    padding_mask = padding_mask.to(x.device)
    rows = torch.arange(batch, device=x.device)[:, None]
    seen = padding_mask.long().cumsum(1)
    return Sequences(
        num_sequences=batch,
        max_length=length,
        index=torch.where(padding_mask, rows, batch).flatten(),
        valid=padding_mask.flatten(),
        position=(seen - 1).clamp_min(0).flatten(),
        lengths=padding_mask.sum(1),
    )


def _packed(x: Tensor, batch: int, length: int, cu_seqlens: Tensor, max_length: int | None) -> Sequences:
    if batch != 1:
        raise ValueError(f"packed input (cu_seqlens) must have B = 1, got B = {batch}")
    check_cu_seqlens(cu_seqlens, length, max_length)
    borders = cu_seqlens.to(device=x.device, dtype=torch.int64)
    tokens = torch.arange(length, device=x.device)
    index = torch.searchsorted(borders[1:], tokens, right=True)
    return Sequences(
        num_sequences=borders.numel() - 1,
        max_length=length if max_length is None else min(max_length, length),
        index=index,
        # Borders on a GPU are not looked at: what they leave out is treated as padding.
        valid=tokens < borders[-1],
        position=tokens - borders[index],
        lengths=borders.diff(),
    )
