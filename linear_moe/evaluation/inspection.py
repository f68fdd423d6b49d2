"""Which memories each token of a text used, in every mixture of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from linear_moe.evaluation.segments import Sizes, hidden_in_segments
from linear_moe.models.model import LanguageModel


class HeldToken(NamedTuple):
    """A token among those that a memory was written with."""

    token: int
    times: int
    """How often it went to this memory."""
    share: float
    """Of all its occurrences."""


@dataclass(frozen=True)
class LayerPicks:
    """What the router of one mixture decided for T tokens."""

    layer: int
    """Its index in the model."""
    num_memories: int
    picks: list[list[int]] = field(default_factory=list)
    """`[T][top_k]`, the best first."""
    weights: list[list[float]] = field(default_factory=list)
    """`[T][top_k]`"""

    def loads(self) -> list[float]:
        """The share of all picks that each memory got."""
        counts = Counter(memory for picks in self.picks for memory in picks)
        total = max(counts.total(), 1)
        return [counts[memory] / total for memory in range(self.num_memories)]

    def held(self, tokens: Sequence[int], memory: int, count: int) -> list[HeldToken]:
        """The tokens that went to a memory most often; the lower token first where two did alike."""
        mine = Counter(token for token, picks in zip(tokens, self.picks, strict=True) if memory in picks)
        all_tokens = Counter(tokens)
        ranked = sorted(mine.items(), key=lambda item: (-item[1], item[0]))
        return [HeldToken(token, times, times / all_tokens[token]) for token, times in ranked[:count]]


@dataclass(frozen=True)
class Inspection:
    """A text and what a model did with it."""

    model: str
    num_layers: int
    tokens: list[int]
    layers: list[LayerPicks]
    """The mixtures of memories; other layers have no picks."""


@torch.no_grad()
def inspect_text(model: LanguageModel, tokens: Sequence[int], *, sizes: Sizes | None = None) -> Inspection:
    """Run a text through the model, in segments, and note what its routers pick.

    Args:
        model: with or without mixtures of memories.
        tokens: at least one.
        sizes: how much is read at once.

    Raises:
        ValueError: if there are no tokens.
    """
    if not tokens:
        raise ValueError("tokens must have at least one token, got none")
    mixtures = model.memory_layers()
    layers = [LayerPicks(index, mixture.num_memories) for index, mixture in mixtures]
    row = torch.tensor([list(tokens)], device=next(model.parameters()).device)
    for _ in hidden_in_segments(model, row, (sizes or Sizes()).segment):
        for layer, (_, mixture) in zip(layers, mixtures, strict=True):
            assert mixture.routing is not None
            layer.picks.extend(mixture.routing.indices.tolist())
            layer.weights.extend(mixture.routing.weights.tolist())
    return Inspection(model.config.name or "model", len(model.blocks), list(tokens), layers)
