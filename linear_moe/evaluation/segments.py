"""Long texts in pieces: what a pass takes does not grow with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from linear_moe.models.model import LanguageModel
from linear_moe.models.session import evaluating


@dataclass(frozen=True)
class Sizes:
    """How much is done at once.

    Args:
        segment: tokens of each sequence that are read in one pass.
        batch_tokens: tokens of the sequences of a batch together, about; a sequence that is longer is alone.

    Raises:
        ValueError: if one is below 1.
    """

    segment: int = 2048
    batch_tokens: int = 16384

    def __post_init__(self) -> None:
        for name, value in (("segment", self.segment), ("batch_tokens", self.batch_tokens)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def batches(self, count: int, length: int) -> Iterator[tuple[int, int]]:
        """Ranges of `count` sequences of `length` tokens that are read together."""
        size = max(self.batch_tokens // length, 1)
        for start in range(0, count, size):
            yield start, min(start + size, count)


@torch.no_grad()
def hidden_in_segments(model: LanguageModel, tokens: Tensor, segment: int) -> Iterator[tuple[int, Tensor]]:
    """The final hidden states of `tokens` `[B, T]`, in evaluation mode: the first position of each segment, and
    `[B, segment, D]`. The last segment may be shorter.
    """
    state = model.new_state(tokens.shape[0])
    with evaluating(model):
        for start in range(0, tokens.shape[1], segment):
            yield start, model.hidden(tokens[:, start : start + segment], state=state)
