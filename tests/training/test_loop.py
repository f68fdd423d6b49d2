"""A step: accumulation, auxiliary losses, clipping, divergence."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from small_models import recall_task, small_model, text_task

from linear_moe.data.batch import IGNORE_INDEX, Batch
from linear_moe.layers.auxiliary import AuxiliaryLoss, collect_auxiliary_losses
from linear_moe.models import LanguageModel
from linear_moe.training.backward import PlainBackward, Scored, autocast, summed_loss
from linear_moe.training.loop import accumulate_gradients, optimise
from linear_moe.training.optimizer import build_optimizer
from linear_moe.training.settings import TrainSettings
from linear_moe.training.tasks import Task


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
    loss = accumulate_gradients(model, batches, PlainBackward(model, "float32"))
    came = _gradients(model)

    torch.manual_seed(3)
    wanted_model = small_model(auxiliary="collect", balance_weight=0.7).double()
    total, plain = torch.zeros((), dtype=torch.float64), 0.0
    for batch, labels in zip(batches, (12, 5), strict=True):
        part, share = summed_loss(wanted_model, Scored.of(batch)) / labels, labels / 17
        plain += share * part.item()
        total = total + share * (part + collect_auxiliary_losses(wanted_model))
    total.backward()
    wanted = _gradients(wanted_model)
    assert float(loss) == pytest.approx(plain, rel=1e-12)
    assert came.keys() == wanted.keys()
    for name in came:
        torch.testing.assert_close(came[name], wanted[name], rtol=1e-10, atol=1e-12)
    assert all(float(part.scale) == 1.0 for part in model.modules() if isinstance(part, AuxiliaryLoss))


def _one_batch(batches: list[Batch]) -> Batch:
    """Batches side by side."""
    tokens, labels = (
        torch.cat([batch[i] for batch in batches], 1 if batches[0].cu_seqlens is not None else 0) for i in (0, 1)
    )  # type: ignore[misc]
    if batches[0].cu_seqlens is None:
        return Batch(tokens, labels)
    length = batches[0].tokens.shape[1]
    borders = [batch.cu_seqlens[1:] + i * length for i, batch in enumerate(batches) if batch.cu_seqlens is not None]
    return Batch(tokens, labels, torch.cat([torch.zeros(1, dtype=torch.int64), *borders]))


@pytest.mark.parametrize("auxiliary", ["attach", "collect"])
@pytest.mark.parametrize("task", [recall_task, text_task])
def test_parts_add_up_to_one_batch(task: Callable[[], Task], auxiliary: str) -> None:
    """With the z-loss, a mean over tokens; the balance loss is a product of two means, and the same only for equal parts."""
    vocabulary = 16 if task is recall_task else 257
    batches = [task().batch(index) for index in range(3)]
    for parts, options in ((batches, {"balance_weight": 0.0}), (batches[:1] * 3, {"balance_weight": 0.7})):
        gradients, losses = [], []
        for step in (parts, [_one_batch(parts)]):
            torch.manual_seed(1)
            model = small_model(vocabulary, auxiliary, z_loss_weight=0.3, **options).double()
            losses.append(float(accumulate_gradients(model, step, PlainBackward(model, "float32"))))
            gradients.append(_gradients(model))
        assert losses[0] == pytest.approx(losses[1], rel=1e-12)
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-9, atol=1e-12)


def test_a_batch_without_labels_counts_for_nothing() -> None:
    gradients = []
    for number in (1, 2):
        torch.manual_seed(1)
        model = small_model()
        batch = recall_task().batch(0)
        batches = [batch, batch._replace(labels=torch.full_like(batch.labels, IGNORE_INDEX))][:number]
        accumulate_gradients(model, batches, PlainBackward(model, "float32"))
        gradients.append(_gradients(model))
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


def test_gradients_are_clipped_together() -> None:
    model = small_model()
    settings = TrainSettings(steps=1, gradient_clip=1e-3)
    (report,) = optimise(model, build_optimizer(model, settings), recall_task(), settings)
    norms = [gradient.norm() for gradient in _gradients(model).values()]
    assert report.gradient_norm > 0.1
    assert float(torch.stack(norms).norm()) == pytest.approx(1e-3, rel=1e-3)


def test_in_bfloat16_parameters_gradients_and_the_optimiser_stay_wide() -> None:
    model = small_model()
    settings = TrainSettings(steps=1, precision="bfloat16")
    optimizer = build_optimizer(model, settings)
    list(optimise(model, optimizer, recall_task(), settings))
    for parameter in model.parameters():
        assert parameter.grad is not None
        tensors = [parameter, parameter.grad, *optimizer.state[parameter].values()]
        assert all(tensor.dtype == torch.float32 for tensor in tensors)
    with autocast(model, "bfloat16"):
        assert model(recall_task().batch(0).tokens).dtype == torch.bfloat16


def test_the_balance_loss_does_something() -> None:
    """The comparison above would also hold if both sides left it out."""
    gradients = []
    for weight in (0.0, 0.7):
        torch.manual_seed(3)
        model = small_model(balance_weight=weight)
        accumulate_gradients(model, _unequal_batches(), PlainBackward(model, "float32"))
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
