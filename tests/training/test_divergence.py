"""A loss that is no number: where it began is found, and the batch is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_models import recall_task, small_config, small_model

from linear_moe.models import LanguageModel
from linear_moe.training.divergence import DivergedError, first_bad_gradient, save_batches
from linear_moe.training.loop import optimise
from linear_moe.training.optimizer import build_optimizer
from linear_moe.training.settings import TrainSettings


def _poisoned(model: LanguageModel, poison: str, value: float) -> DivergedError:
    """What a step says once one number of the parameter `poison` is `value`, after a good step."""
    settings = TrainSettings(steps=5, accumulate=2)
    steps = optimise(model, build_optimizer(model, settings), recall_task(), settings)
    next(steps)
    with torch.no_grad():
        model.get_parameter(poison).flatten()[:] = value
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(DivergedError) as caught:
        next(steps)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)
    return caught.value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("poison", "layer"),
    [
        ("embedding.weight", "embedding"),
        ("blocks.1.mixer_norm.weight", "blocks.1.mixer_norm"),
        ("blocks.1.mixer.memory_weight", "blocks.1.mixer.norm"),
        ("blocks.0.ffn_norm.weight", "blocks.0.ffn_norm"),
        ("norm.weight", "norm"),
        ("head.weight", "the head"),
    ],
)
def test_the_first_layer_whose_output_is_not_finite_is_named(poison: str, layer: str, value: float) -> None:
    model = LanguageModel(small_config().model_copy(update={"layers": "m*2"}))
    error = _poisoned(model, poison, value)
    assert error.step == 2
    assert error.layer == layer
    assert "step 2: the loss is nan" in str(error)
    where = f"the first output that is not finite is that of {layer}, and the parameter {poison} is not finite to begin with"
    assert f"{where}. The last good parameters are those of step 1" in str(error)
    assert all(not module._forward_hooks for module in model.modules())


def test_the_loads_of_a_step_that_was_not_done_are_forgotten() -> None:
    model = small_model(balance_bias_rate=0.1)
    _poisoned(model, "norm.weight", float("nan"))
    bias = model.memory_layers()[0][1].router.bias
    assert bias is not None
    assert not bias.pending.any()


def test_a_gradient_that_is_not_finite_is_named() -> None:
    model = small_model()
    model.blocks[0].ffn_norm.weight.register_hook(lambda gradient: gradient * float("inf"))  # type: ignore[union-attr, operator]
    settings = TrainSettings(steps=5)
    with pytest.raises(DivergedError, match=r"the gradient norm is (inf|nan); nearest to the loss") as caught:
        next(optimise(model, build_optimizer(model, settings), recall_task(), settings))
    assert caught.value.layer == "blocks.0.ffn_norm.weight"


def test_a_gradient_of_finite_numbers_may_still_be_too_large() -> None:
    model = small_model()
    model.norm.weight.register_hook(lambda gradient: torch.full_like(gradient, 3e38))
    settings = TrainSettings(steps=5)
    with pytest.raises(DivergedError, match="the gradient norm is inf; it is too large") as caught:
        next(optimise(model, build_optimizer(model, settings), recall_task(), settings))
    assert caught.value.layer is None
    assert first_bad_gradient(model) is None


def test_the_batches_are_read_without_running_anything(tmp_path: Path) -> None:
    error = _poisoned(small_model(), "norm.weight", float("nan"))
    content = torch.load(save_batches(error, tmp_path), weights_only=True)
    assert (content["step"], content["layer"], content["message"]) == (2, "norm", str(error))
    wanted = [recall_task().batch(index) for index in (2, 3)]
    for saved, batch in zip(content["batches"], wanted, strict=True):
        assert torch.equal(saved["tokens"], batch.tokens)
        assert torch.equal(saved["labels"], batch.labels)
