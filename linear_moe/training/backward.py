"""A batch's loss and gradients: what a step of training adds up."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from linear_moe.data.batch import IGNORE_INDEX, Batch
from linear_moe.layers.auxiliary import collect_auxiliary_losses
from linear_moe.models.model import LanguageModel


class Scored(NamedTuple):
    """A batch as the model takes it: its labels apart from the positions without one."""

    tokens: Tensor
    """`[B, T]` int64."""
    labels: Tensor
    """`[L]` int64."""
    places: Tensor | None
    """`[L]` int64 where they stand in the flattened tokens; None if every position has one."""
    cu_seqlens: Tensor | None
    """`[N + 1]` borders of packed documents."""
    max_length: int | None
    """A bound on their tokens."""

    @classmethod
    def of(cls, batch: Batch) -> Scored:
        """Found where the batch is made, on the CPU: on a GPU the number of labels would have to be waited for."""
        flat = batch.labels.flatten()
        labelled = flat != IGNORE_INDEX
        if bool(labelled.all()):
            return cls(batch.tokens, flat, None, batch.cu_seqlens, batch.max_length)
        places = labelled.nonzero()[:, 0]
        return cls(batch.tokens, flat[places], places, batch.cu_seqlens, batch.max_length)

    def map(self, change: Callable[[Tensor], Tensor]) -> Scored:
        """The same with every tensor changed."""
        return Scored(*(change(x) if isinstance(x, Tensor) else x for x in self))  # type: ignore[arg-type]


def autocast(model: nn.Module, precision: str) -> torch.autocast:
    """The context of a forward: for "bfloat16" the large products are in it, parameters and optimiser stay float32.

    Parameters kept in bfloat16 would lose what is learned: with 8 bits, an update below 1/256 of a weight is rounded away,
    and late in training most are.
    """
    return torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=precision == "bfloat16")


def summed_loss(model: LanguageModel, scored: Scored) -> Tensor:
    """Sum of the cross entropy over the labels, in nats. Only labelled positions go through the head."""
    summed: Tensor = model(
        scored.tokens,
        cu_seqlens=scored.cu_seqlens,
        max_length=scored.max_length,
        places=scored.places,
        labels=scored.labels,
    )
    return summed


def backpropagate(
    model: LanguageModel, scored: Scored, precision: str, weight: float | Tensor, auxiliary: float | Tensor
) -> Tensor:
    """Add gradients of the summed loss times `weight` and of collected auxiliary losses times `auxiliary`.

    Returns:
        The weighted loss, without its graph.
    """
    with autocast(model, precision):
        loss = summed_loss(model, scored) * weight
    collected = collect_auxiliary_losses(model)
    # Without any it is a 0 on the CPU.
    (loss + collected * auxiliary if collected.requires_grad else loss).backward()
    return loss.detach()


class Backward(Protocol):
    """Gradients of a step's batches, one after another."""

    def __call__(self, scored: Scored, weight: float, auxiliary: float, *, first: bool, last: bool) -> Tensor:
        """Of one batch, on the CPU; after the `last` the parameters' gradients are those of all since the `first`.

        Returns:
            The weighted loss.
        """


class PlainBackward:
    """Call by call, into gradients that are None before a step's first batch."""

    def __init__(self, model: LanguageModel, precision: str) -> None:
        self.model, self.precision = model, precision

    def __call__(self, scored: Scored, weight: float, auxiliary: float, *, first: bool, last: bool) -> Tensor:
        """See `Backward`."""
        device = next(self.model.parameters()).device
        return backpropagate(self.model, scored.map(lambda x: x.to(device)), self.precision, weight, auxiliary)
