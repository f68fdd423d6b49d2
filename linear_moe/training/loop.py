"""The optimisation itself: steps of a model on a task. No files, no terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from linear_moe.data.batch import Batch
from linear_moe.layers.auxiliary import set_auxiliary_scale
from linear_moe.layers.balance import BalanceBias
from linear_moe.models.model import LanguageModel
from linear_moe.training.backward import Backward, PlainBackward, Scored, autocast, summed_loss
from linear_moe.training.captured import CapturedBackward
from linear_moe.training.distributed import ALONE, World, reduce_gradients, whole
from linear_moe.training.divergence import DivergedError, first_bad_gradient, first_bad_parameter, first_not_finite
from linear_moe.training.optimizer import set_learning_rate
from linear_moe.training.schedule import learning_rate
from linear_moe.training.settings import TrainSettings
from linear_moe.training.tasks import Task


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
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    task: Task,
    settings: TrainSettings,
    *,
    start: int = 0,
    world: World = ALONE,
) -> Iterator[StepReport]:
    """Train from step `start` on; what is yielded has been done, and the model may be looked at or saved between.

    Of several processes each takes its share of a step's batches; the reports are those of the whole step.

    Raises:
        DivergedError: naming the step whose loss or gradient is not finite, and where that began. The parameters are as
            before that step.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    backward = choose_backward(model, settings, world)
    for step in range(start, settings.steps):
        batches = [task.batch(index) for index in world.batches(step, settings.accumulate)]
        model.train()
        rate = learning_rate(step, settings)
        set_learning_rate(optimizer, rate)
        optimizer.zero_grad(set_to_none=True)
        total = accumulate_gradients(model, batches, backward, world)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        total_norm = whole(nn.utils.get_total_norm(gradients))
        tokens = world.total(sum(batch.tokens.numel() for batch in batches), total.device)
        # One wait for the device a step.
        loss, norm = torch.stack((total.double(), total_norm.double())).tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise _diverged(model, batches, settings, world, step, loss, norm, rate)
        nn.utils.clip_grads_with_norm_(parameters, settings.gradient_clip, total_norm)
        optimizer.step()
        for module in model.modules():
            if isinstance(module, BalanceBias):
                # The same on every process: a bias is no parameter, and nothing else would keep them alike.
                world.sum_(module.pending)
                module.update_balance_bias()
        yield StepReport(step + 1, loss, norm, rate, tokens)


def choose_backward(model: LanguageModel, settings: TrainSettings, world: World = ALONE) -> Backward:
    """By captured graphs on a GPU, unless the settings say otherwise or the model is sharded."""
    on_gpu = next(model.parameters()).device.type == "cuda"
    kind = CapturedBackward if on_gpu and settings.capture and world.size == 1 else PlainBackward
    return kind(model, settings.precision)


def accumulate_gradients(
    model: LanguageModel, batches: Sequence[Batch], backward: Backward, world: World = ALONE
) -> Tensor:
    """Make the parameters' gradients those of the mean loss over all labels of all processes' `batches`.

    A batch counts by its labels: the gradient is that of one batch of all their sequences. Its auxiliary losses, which are
    means over a batch's tokens, take the same factor, attached or collected.

    Returns:
        That loss, a scalar, the same on every process.
    """
    scored = [Scored.of(batch) for batch in batches]
    counts = [batch.labels.numel() for batch in scored]
    every = max(world.total(sum(counts), next(model.parameters()).device), 1)
    losses, attached = [], 1.0
    for number, (batch, count) in enumerate(zip(scored, counts, strict=True), 1):
        last = number == len(scored)
        reduce_gradients(model, last)
        # Of several processes' gradients the mean is taken, where the sum is meant.
        weight = world.size / every
        if attached != count * weight:
            # Before the forward: what is attached is attached with the scale of that moment.
            attached = count * weight
            set_auxiliary_scale(model, attached)
        losses.append(backward(batch, weight, count * weight, first=number == 1, last=last))
    if attached != 1.0:
        set_auxiliary_scale(model, 1.0)
    return world.sum_(torch.stack(losses).sum()) / world.size


def _diverged(
    model: LanguageModel,
    batches: Sequence[Batch],
    settings: TrainSettings,
    world: World,
    step: int,
    loss: float,
    norm: float,
    rate: float,
) -> DivergedError:
    """The error of a step that is not done, with what a second look at it finds."""
    if math.isfinite(loss):
        what = f"the gradient norm is {norm}"
        layer = _first_named(world, first_bad_gradient(model))
        where = f"; nearest to the loss, the gradient of {layer} is not finite" if layer else "; it is too large"
    else:
        what = f"the loss is {loss}"
        device = next(model.parameters()).device

        def again() -> None:
            for batch in batches:
                with autocast(model, settings.precision):
                    summed_loss(model, Scored.of(batch).map(lambda x: x.to(device)))

        layer = _first_named(world, first_not_finite(model, again))
        where = f"; the first output that is not finite is that of {layer or 'the loss'}"
        bad = _first_named(world, first_bad_parameter(model))
        where += f", and the parameter {bad} is not finite to begin with" if bad else ""
    return DivergedError(
        f"step {step + 1}: {what}{where}. The last good parameters are those of step {step}. A smaller learning rate (now "
        f"{rate:.3g}) or a longer warm-up usually helps",
        step=step + 1,
        layer=layer,
        batches=batches,
    )


def _first_named(world: World, name: str | None) -> str | None:
    """What the first process that found something found."""
    return next((found for found in world.gather(name) if found is not None), None)
