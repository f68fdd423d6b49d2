"""The forward pass is the language model's own; the loss counts every label and every auxiliary loss once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_models import KINDS, VOCAB, draw, make, pad
from transformers import DynamicCache

from linear_moe.layers.auxiliary import collect_auxiliary_losses, set_auxiliary_scale
from linear_moe.layers.routing import Router
from linear_moe.models import LanguageModel, build_model

EXACT = {"rtol": 0, "atol": 1e-12}


def weighted_losses(model: torch.nn.Module) -> torch.Tensor:
    """Of the last forward, from what the layers show, not from what they hand in."""
    layers = [part for part in model.modules() if isinstance(getattr(part, "router", None), Router)]
    pairs = [(part.router, part.routing) for part in layers]
    assert pairs
    return sum(r.balance_weight * seen.balance_loss + r.z_loss_weight * seen.z_loss for r, seen in pairs)  # type: ignore[return-value]


def attached(model: Any) -> LanguageModel:
    """The same parameters in a language model that attaches its auxiliary losses."""
    other = build_model(model.config.declaration(), dtype=torch.float64)
    other.load_state_dict(model.model.state_dict())
    return other.train()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name.removeprefix("model."): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=0, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_are_the_language_models_bit_for_bit(kind: str, tied: bool) -> None:
    model = make(KINDS[kind], tie_embeddings=tied)
    tokens, mask = pad([*draw(1, 7), *draw(1, 4)])
    for given, masks in (({}, (None,)), ({"padding_mask": mask.bool()}, (mask, mask.bool(), mask.float()))):
        # With a cache attention has its keys elsewhere in memory, and a CPU may add in another order: each is held to its own.
        cached = model.model(tokens, state=model.model.new_state(len(tokens)), **given)
        expected = model.model(tokens, **given)
        for attention_mask in masks:
            torch.testing.assert_close(model(tokens, attention_mask).logits, cached, rtol=0, atol=0)
            alone = model(tokens, attention_mask, use_cache=False).logits
            torch.testing.assert_close(alone, expected, rtol=0, atol=0)


def test_only_the_columns_asked_for_are_returned() -> None:
    model, tokens = make("mom full"), draw()
    every = model(tokens).logits
    # Rows of a product may differ in their last bit with the number of rows beside them.
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(model(tokens, logits_to_keep=2).logits, every[:, -2:], **close)
    columns = torch.tensor([1, 4])
    torch.testing.assert_close(model(tokens, logits_to_keep=columns).logits, every[:, columns], **close)
    with_loss = model(tokens, labels=tokens, logits_to_keep=2)
    assert with_loss.logits.shape == (2, 2, VOCAB)
    torch.testing.assert_close(with_loss.loss, model(tokens, labels=tokens).loss)


def test_a_tuple_holds_what_the_output_holds() -> None:
    model, tokens = make("mom"), draw()
    loss, logits = model(tokens, labels=tokens, return_dict=False)
    output = model(tokens, labels=tokens)
    assert output.cache is None
    assert torch.equal(loss, output.loss) and torch.equal(logits, output.logits)
    assert len(model(tokens, return_dict=False)) == 2
    assert len(model(tokens, return_dict=False, use_cache=False)) == 1


def test_the_loss_is_of_the_next_token_and_leaves_out_what_is_not_labelled() -> None:
    model, tokens = make("mom full", dtype=torch.float64), draw(2, 6)
    labels = tokens.clone()
    labels[0, 2], labels[1, :3] = -100, -100
    logits = model(tokens).logits
    places = [(row, t) for row in range(2) for t in range(1, 6) if labels[row, t] != -100]
    expected = torch.stack([-F.log_softmax(logits[r, t - 1], -1)[tokens[r, t]] for r, t in places]).mean()
    loss = model(tokens, labels=labels).loss
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected, **EXACT)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_of_a_padded_batch_is_the_mean_over_the_texts_alone(side: str) -> None:
    model = make("mom full", dtype=torch.float64)
    texts = [*draw(1, 7), *draw(1, 4)]
    tokens, mask = pad(texts, side)
    alone = [model(text[None], labels=text[None]).loss for text in texts]
    expected = (6 * alone[0] + 3 * alone[1]) / 9
    torch.testing.assert_close(model(tokens, mask, labels=tokens).loss, expected, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_with_labels_the_auxiliary_losses_are_in_the_loss_once(kind: str) -> None:
    model, tokens = make(KINDS[kind], dtype=torch.float64).train(), draw()
    output = model(tokens, labels=tokens)
    plain = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert weighted_losses(model) > 0
    torch.testing.assert_close(output.loss - plain, weighted_losses(model), **EXACT)
    assert float(collect_auxiliary_losses(model)) == 0
    output.loss.backward()

    other = attached(model)
    F.cross_entropy(other(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    assert_same_gradients(gradients(model), gradients(other))


def test_without_labels_the_auxiliary_losses_are_attached_to_the_logits_once() -> None:
    model, tokens = make(KINDS["memories"], dtype=torch.float64).train(), draw()
    other = attached(model)
    for one, run in ((model, lambda: model(tokens).logits), (other, lambda: other(tokens))):
        set_auxiliary_scale(one, 0.25)
        (0.25 * run()[:, -1].logsumexp(-1).sum()).backward()
    assert_same_gradients(gradients(model), gradients(other))


def test_out_of_training_there_are_no_auxiliary_losses() -> None:
    model, tokens = make("mom", dtype=torch.float64), draw()
    output = model(tokens, labels=tokens)
    torch.testing.assert_close(
        output.loss, F.cross_entropy(output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()), **EXACT
    )


def test_the_losses_of_micro_batches_add_up_in_the_share_of_their_labels() -> None:
    """What `Trainer` does when it accumulates: the parts are the mean over labels, of the auxiliary losses, too."""
    model = make("mom one", dtype=torch.float64).train()
    parts = [draw(2, 5), draw(1, 4)]
    counts = [2 * 4, 3]
    total = sum(counts)
    for part in parts:
        model(part, labels=part, num_items_in_batch=torch.tensor(total)).loss.backward()
    found = gradients(model)
    model.zero_grad()
    loss = sum(count / total * model(part, labels=part).loss for part, count in zip(parts, counts, strict=True))
    loss.backward()
    assert_same_gradients(found, gradients(model))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": None}, "input_ids is required"),
        ({"inputs_embeds": torch.zeros(2, 9, 16)}, "inputs_embeds is not supported"),
        ({"output_hidden_states": True}, "output_hidden_states is not supported"),
        ({"output_attentions": True}, "output_attentions is not supported"),
        ({"attention_mask": torch.ones(2, 8)}, r"attention_mask must be \[2, 9\] for these input_ids, got \[2, 8\]"),
        ({"attention_mask": torch.ones(2, 1, 9, 9)}, "attention_mask must be"),
        ({"labels": torch.zeros(2, 8)}, r"labels must be of the shape of input_ids, \[2, 9\], got \[2, 8\]"),
        ({"cache": DynamicCache()}, "cache must be a LinearMoECache, got DynamicCache"),
        ({"input_ids": torch.full((2, 9), VOCAB)}, rf"tokens must be in \[0, vocab_size = {VOCAB}\), got {VOCAB}"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make("mom")(**{"input_ids": draw()} | arguments)
