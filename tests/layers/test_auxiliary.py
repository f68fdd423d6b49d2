from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from linear_moe import MoMLayer, collect_auxiliary_losses, set_auxiliary_scale
from linear_moe.layers.auxiliary import AuxiliaryLoss

OPTIONS = {"num_heads": 1, "head_dim": 4, "balance_weight": 0.3, "z_loss_weight": 0.1, "dtype": torch.float64}


def layers() -> tuple[MoMLayer, MoMLayer]:
    """The same layer, attaching and collecting its losses."""
    attaching, collecting = (MoMLayer(8, auxiliary=mode, **OPTIONS) for mode in ("attach", "collect"))  # type: ignore[arg-type]
    collecting.load_state_dict(attaching.state_dict())
    return attaching, collecting


def gradients(module: nn.Module) -> list[Tensor]:
    found = [parameter.grad for parameter in module.parameters()]
    assert all(gradient is not None for gradient in found)
    return [gradient for gradient in found if gradient is not None]


def assert_equal(ones: list[Tensor], others: list[Tensor]) -> None:
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


def test_an_attached_loss_gives_the_gradient_of_a_collected_one() -> None:
    attaching, collecting = layers()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    attaching(x).square().sum().backward()
    (collecting(x).square().sum() + collect_auxiliary_losses(collecting)).backward()
    assert_equal(gradients(attaching), gradients(collecting))


def test_the_loss_does_not_change_the_output() -> None:
    attaching, collecting = layers()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    assert torch.equal(attaching(x), collecting(x))


def test_the_router_alone_is_moved_by_the_balance_loss() -> None:
    attaching, _ = layers()
    attaching(torch.randn(2, 9, 8, dtype=torch.float64)).mul(0).sum().backward()
    moved = {name for name, p in attaching.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"router.weight"}


def test_accumulating_over_micro_batches_with_the_scale_equals_scaling_the_loss() -> None:
    attaching, collecting = layers()
    micro_batches = torch.randn(4, 2, 9, 8, dtype=torch.float64)
    set_auxiliary_scale(attaching, 1 / 4)
    for x in micro_batches:
        (attaching(x).square().sum() / 4).backward()
        ((collecting(x).square().sum() + collect_auxiliary_losses(collecting)) / 4).backward()
    assert_equal(gradients(attaching), gradients(collecting))


def test_the_scale_is_read_in_the_backward_pass_and_reaches_every_layer() -> None:
    model = nn.Sequential(*(MoMLayer(8, **OPTIONS) for _ in range(2)))  # type: ignore[arg-type]
    set_auxiliary_scale(model, 0.0)
    assert [float(part.scale) for part in model.modules() if isinstance(part, AuxiliaryLoss)] == [0.0, 0.0]
    model(torch.randn(1, 5, 8, dtype=torch.float64)).mul(0).sum().backward()
    assert not any(gradient.any() for gradient in gradients(model))


def test_each_collected_loss_is_handed_out_once() -> None:
    _, collecting = layers()
    collecting(torch.randn(2, 9, 8, dtype=torch.float64))
    assert collecting.routing is not None
    expected = 0.3 * collecting.routing.balance_loss + 0.1 * collecting.routing.z_loss
    torch.testing.assert_close(collect_auxiliary_losses(collecting).detach(), expected)
    assert collect_auxiliary_losses(collecting).item() == 0


def test_losses_of_several_layers_are_summed() -> None:
    model = nn.Sequential(*(MoMLayer(8, auxiliary="collect", **OPTIONS) for _ in range(3)))  # type: ignore[arg-type]
    model(torch.randn(1, 5, 8, dtype=torch.float64))
    routings = [layer.routing for layer in model if isinstance(layer, MoMLayer)]
    expected = sum(float(0.3 * r.balance_loss + 0.1 * r.z_loss) for r in routings if r is not None)
    assert collect_auxiliary_losses(model).item() == pytest.approx(expected)


@pytest.mark.parametrize("training, grad", [(False, True), (True, False)])
def test_there_is_no_loss_out_of_training(training: bool, grad: bool) -> None:
    _, collecting = layers()
    collecting.train(training)
    with torch.set_grad_enabled(grad):
        collecting(torch.randn(2, 9, 8, dtype=torch.float64))
    assert collect_auxiliary_losses(collecting).item() == 0


def test_a_forward_without_gradients_forgets_the_loss_of_the_one_before() -> None:
    _, collecting = layers()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    collecting(x)
    with torch.no_grad():
        collecting(x)
    assert collect_auxiliary_losses(collecting).item() == 0


def test_the_scale_stays_float32_whatever_the_layer_is_cast_to() -> None:
    layer = MoMLayer(8, num_heads=1, head_dim=4).bfloat16()
    set_auxiliary_scale(layer, 1 / 3)
    assert layer.router.auxiliary.scale.dtype == torch.float32


def test_the_values_are_readable_from_the_layer() -> None:
    attaching, _ = layers()
    assert attaching.routing is None
    attaching(torch.randn(2, 9, 8, dtype=torch.float64))
    assert attaching.routing is not None
    assert attaching.routing.balance_loss.item() > 0
    assert attaching.routing.load.sum().item() == pytest.approx(1)
    assert attaching.routing.indices.shape == attaching.routing.weights.shape == (18, 2)


def test_a_copy_made_between_forward_and_backward_keeps_its_own_loss() -> None:
    _, collecting = layers()
    collecting(torch.randn(2, 9, 8, dtype=torch.float64))
    collect_auxiliary_losses(collecting)
    assert collect_auxiliary_losses(copy.deepcopy(collecting)).item() == 0
