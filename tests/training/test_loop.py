"""A step: accumulation, auxiliary losses, clipping, divergence."""

from __future__ import annotations

import math

import pytest
import torch
from small_models import recall_task, small_model, text_task

from linear_moe.data.batch import IGNORE_INDEX, Batch
from linear_moe.layers.auxiliary import AuxiliaryLoss, collect_auxiliary_losses
from linear_moe.models import LanguageModel
from linear_moe.training.loop import accumulate_gradients, optimise, summed_loss
from linear_moe.training.optimizer import build_optimizer
from linear_moe.training.settings import TrainSettings


def _gradients(model: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _unequal_batches() -> list[Batch]:
    """Of 12 and of 5 labels."""
    first, second = recall_task().batch(0), recall_task().batch(1)
    labels = second.labels.clone()
    labels[labels != IGNORE_INDEX] = torch.where(torch.arange(12) < 5, labels[labels != IGNORE_INDEX], IGNORE_INDEX)
    return [first, second._replace(labels=labels)]


@pytest.mark.parametrize("auxiliary", ["attach", "collect"])
def test_accumulated_gradients_are_those_of_all_labels_and_their_auxiliary_losses(auxiliary: str) -> None:
    torch.manual_seed(3)
    model = small_model(auxiliary=auxiliary, balance_weight=0.7).double()
    batches = _unequal_batches()
    loss = accumulate_gradients(model, batches)
    came = _gradients(model)

    torch.manual_seed(3)
    wanted_model = small_model(auxiliary="collect", balance_weight=0.7).double()
    total, plain = torch.zeros((), dtype=torch.float64), 0.0
    for batch, labels in zip(batches, (12, 5), strict=True):
        part, share = summed_loss(wanted_model, batch) / labels, labels / 17
        plain += share * part.item()
        total = total + share * (part + collect_auxiliary_losses(wanted_model))
    total.backward()
    wanted = _gradients(wanted_model)
    assert float(loss) == pytest.approx(plain, rel=1e-12)
    assert came.keys() == wanted.keys()
    for name in came:
        torch.testing.assert_close(came[name], wanted[name], rtol=1e-10, atol=1e-12)
    assert all(float(part.scale) == 1.0 for part in model.modules() if isinstance(part, AuxiliaryLoss))


def test_the_balance_loss_does_something() -> None:
    """The comparison above would also hold if both sides left it out."""
    gradients = []
    for weight in (0.0, 0.7):
        torch.manual_seed(3)
        model = small_model(balance_weight=weight)
        accumulate_gradients(model, _unequal_batches())
        gradients.append(_gradients(model)["blocks.0.mixer.router.weight"])
    assert not torch.allclose(*gradients)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_loss_falls(precision: str) -> None:
    model = small_model(vocab_size=257)
    settings = TrainSettings(steps=30, learning_rate=1e-2, precision=precision)
    reports = list(optimise(model, build_optimizer(model, settings), text_task(), settings))
    assert [report.step for report in reports] == list(range(1, 31))
    assert all(report.tokens == 32 and report.gradient_norm > 0 for report in reports)
    assert reports[0].loss == pytest.approx(math.log(257), rel=0.05)
    assert sum(report.loss for report in reports[-5:]) / 5 < reports[0].loss - 1


def test_balance_biases_are_updated_once_a_step() -> None:
    model = small_model(balance_bias_rate=0.25, balance_weight=0.0)
    settings = TrainSettings(steps=1, accumulate=3)
    list(optimise(model, build_optimizer(model, settings), recall_task(), settings))
    bias = model.memory_layers()[0][1].router.bias
    assert bias is not None
    assert bias.bias.abs().max() == 0.25
    assert not bias.pending.any()
