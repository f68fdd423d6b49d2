"""The optimisation itself: steps of a model on a task. No files, no terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linear_moe.data.batch import IGNORE_INDEX, Batch
from linear_moe.layers.auxiliary import collect_auxiliary_losses, set_auxiliary_scale
from linear_moe.models.model import LanguageModel
from linear_moe.training.optimizer import set_learning_rate
from linear_moe.training.schedule import learning_rate
from linear_moe.training.settings import TrainSettings
from linear_moe.training.tasks import Task


class DivergedError(RuntimeError):
    """The loss or its gradient is no longer a number."""


class StepReport(NamedTuple):
    """What a step did."""

    step: int
    """Steps done, this one included."""
    loss: float
    """Mean over the step's labels, before the step, auxiliary losses not counted."""
    gradient_norm: float
    """Before clipping."""
    learning_rate: float
    tokens: int


def optimise(
    model: LanguageModel, optimizer: torch.optim.Optimizer, task: Task, settings: TrainSettings, *, start: int = 0
) -> Iterator[StepReport]:
    """Train from step `start` on; what is yielded has been done, and the model may be looked at or saved between.

    Raises:
        DivergedError: naming the step whose loss or gradient is not finite. The parameters are as before that step.
    """
    for step in range(start, settings.steps):
        batches = [task.batch(step * settings.accumulate + part) for part in range(settings.accumulate)]
        model.train()
        rate = learning_rate(step, settings)
        set_learning_rate(optimizer, rate)
        optimizer.zero_grad(set_to_none=True)
        loss = accumulate_gradients(model, batches, settings.precision)
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = "loss" if not math.isfinite(loss) else "gradient norm"
            raise DivergedError(
                f"step {step + 1}: the {what} is {loss if what == 'loss' else norm}; the last good parameters are those of "
                f"step {step}. A smaller learning rate (now {rate:.3g}) or a longer warm-up usually helps"
            )
        optimizer.step()
        for module in model.modules():
            update = getattr(module, "update_balance_bias", None)
            if update is not None:
                update()
        yield StepReport(step + 1, loss, norm, rate, sum(batch.tokens.numel() for batch in batches))


def accumulate_gradients(model: LanguageModel, batches: Sequence[Batch], precision: str = "float32") -> float:
    """Add the gradient of the mean loss over all labels of `batches` to the parameters; returns that loss.

    A batch counts by its labels. Its auxiliary losses take the same factor, attached or collected.
    """
    counts = [batch.num_labels for batch in batches]
    device = next(model.parameters()).device
    total = 0.0
    for batch, count in zip(batches, counts, strict=True):
        share = count / max(sum(counts), 1)
        # Before the forward: what is attached is attached with the scale of that moment.
        set_auxiliary_scale(model, share)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = label_loss(model, batch) * share
        (loss + share * collect_auxiliary_losses(model).to(loss.device)).backward()
        total += float(loss.detach())
    set_auxiliary_scale(model, 1.0)
    return total


def label_loss(model: LanguageModel, batch: Batch) -> Tensor:
    """Mean cross entropy over the batch's labels, in nats. Only labelled positions go through the head."""
    device = next(model.parameters()).device
    # Found where the batch is made, on the CPU: on a GPU their number would have to be waited for.
    places = (batch.labels.flatten() != IGNORE_INDEX).nonzero()[:, 0]
    labels = batch.labels.flatten()[places].to(device)
    borders = None if batch.cu_seqlens is None else batch.cu_seqlens.to(device)
    hidden = model.hidden(batch.tokens.to(device), cu_seqlens=borders).flatten(0, 1)
    return F.cross_entropy(model.logits(hidden[places.to(device)]).float(), labels)
