"""What a training step is given."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""The label of a position that is not scored: `torch.nn.functional.cross_entropy`'s default."""


class Batch(NamedTuple):
    """Tokens and what to predict at each; with `cu_seqlens` one row of packed documents."""

    tokens: Tensor
    """`[B, T]` int64."""
    labels: Tensor
    """`[B, T]` int64: what to predict at each position (nothing is shifted later), or `IGNORE_INDEX`."""
    cu_seqlens: Tensor | None = None
    """`[N + 1]` int64 borders of packed documents; then B = 1."""
    max_length: int | None = None
    """A bound on the tokens of a packed document: the same of every batch, or each would be a graph of its own on a GPU."""

    @property
    def num_labels(self) -> int:
        """Positions that are scored."""
        return int((self.labels != IGNORE_INDEX).sum())

    def to(self, device: torch.device | str) -> Batch:
        """The batch on another device."""
        borders = None if self.cu_seqlens is None else self.cu_seqlens.to(device)
        return Batch(self.tokens.to(device), self.labels.to(device), borders, self.max_length)


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator that depends on all of `numbers`, whatever their order of size: (seed, step, part)."""
    state = 0
    for number in numbers:
        # The finaliser of splitmix64: near numbers give unrelated seeds.
        state = (state + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return torch.Generator().manual_seed(state >> 1)
