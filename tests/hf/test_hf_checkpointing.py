"""Computing a block again in the backward pass changes no gradient and counts no loss twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_models import KINDS, draw, make, pad

from linear_moe.layers.auxiliary import collect_auxiliary_losses
from linear_moe.models import Block, build_model


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=0, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


def count_runs(model: Any) -> list[int]:
    """How often each block has run; filled as it goes."""
    blocks = [part for part in model.modules() if isinstance(part, Block)]
    runs = [0] * len(blocks)
    for index, block in enumerate(blocks):

        def count(module: Any, args: Any, output: Any, index: int = index) -> None:
            runs[index] += 1

        block.mixer_norm.register_forward_hook(count)
    return runs


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_without(kind: str, labelled: bool) -> None:
    model = make(KINDS[kind], dtype=torch.float64).train()
    runs = count_runs(model)
    tokens, mask = pad([*draw(1, 7), *draw(1, 4)])

    def loss() -> torch.Tensor:
        if labelled:
            return model(tokens, mask, labels=tokens).loss
        return model(tokens, mask).logits.logsumexp(-1).sum()

    plain = loss()
    expected = gradients(model, plain)
    assert set(runs) == {1}
    model.activation_checkpointing_enable()
    assert model.is_activation_checkpointing
    again = loss()
    torch.testing.assert_close(again, plain, rtol=0, atol=0)
    assert_same(gradients(model, again), expected)
    assert set(runs) == {3}
    assert float(collect_auxiliary_losses(model)) == 0
    model.activation_checkpointing_disable()
    assert_same(gradients(model, loss()), expected)
    assert set(runs) == {4}


@pytest.mark.parametrize("auxiliary", ["attach", "collect"])
def test_the_language_model_alone_does_the_same(auxiliary: str) -> None:
    model = build_model(make("mom one").config.declaration(), dtype=torch.float64, auxiliary=auxiliary).train()
    tokens = draw()

    def loss() -> torch.Tensor:
        return model(tokens).logsumexp(-1).sum() + collect_auxiliary_losses(model)

    expected = gradients(model, loss())
    for block in model.blocks:
        block.gradient_checkpointing = True
    first, second = loss(), loss()
    assert_same(gradients(model, first), expected)
    # The backward pass of an earlier forward takes nothing from a later one that is still to be collected.
    third = model(tokens).logsumexp(-1).sum()
    second.backward()
    assert_same(gradients(model, third + collect_auxiliary_losses(model)), expected)


def test_only_some_layers_may_be_computed_again() -> None:
    model = make("mom full mom one").train()
    runs = count_runs(model)
    model.activation_checkpointing_enable(every_n_layers=2)
    model(draw(), labels=draw()).loss.backward()
    assert runs == [2, 1, 2, 1]


def test_the_older_name_still_works() -> None:
    model = make("mom").train()
    with pytest.warns(FutureWarning, match="activation_checkpointing_enable"):
        model.gradient_checkpointing_enable()
    assert model.model.blocks[0].gradient_checkpointing


def test_nothing_is_computed_again_where_it_would_be_wrong_or_useless() -> None:
    model, tokens = make("mom full", dtype=torch.float64), draw()
    model.activation_checkpointing_enable()
    runs = count_runs(model)
    model(tokens, labels=tokens).loss.backward()
    assert set(runs) == {1}  # evaluation
    model.train()
    # A state would be updated twice.
    expected = model.model(tokens)
    state = model.model.new_state(2)
    logits = torch.cat([model.model(part, state=state) for part in tokens.split([4, 5], 1)], 1)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    logits.sum().backward()
    assert state.tokens_seen.tolist() == [9, 9]
    # Without gradients a cache may be asked for in training mode, too.
    generated = model.generate(tokens, max_new_tokens=3, do_sample=False)
    assert torch.equal(generated, model.eval().generate(tokens, max_new_tokens=3, do_sample=False))


def test_a_reentrant_checkpoint_is_refused() -> None:
    model = make("mom")
    with pytest.raises(ValueError, match="use_reentrant must be False"):
        model.activation_checkpointing_enable({"use_reentrant": True})
    assert not model.is_activation_checkpointing
