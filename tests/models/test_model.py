"""The language model: one function in training, prefill and decoding, whatever the batch."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from linear_moe.layers.auxiliary import collect_auxiliary_losses
from linear_moe.layers.mixture_of_experts import MixtureOfExperts
from linear_moe.layers.mom import MoMLayer
from linear_moe.layers.routing import Router
from linear_moe.layers.state_file import STATE_FORMAT
from linear_moe.models import LanguageModel, ModelConfig, ModelState, build_model

HYBRID = """\
hidden_size: 16
vocab_size: 11
blocks:
  mixture: {mixer: {type: mom, num_heads: 2, head_dim: 4, num_memories: 3}, ffn: {type: swiglu, width: 8}}
  plain:
    mixer: {type: memory, rule: retnet, num_heads: 1, head_dim: 4, conv_scope: sequence}
    ffn: {type: moe, num_experts: 3, width: 8, num_shared_experts: 1}
  full: {mixer: {type: attention, num_heads: 2, num_kv_heads: 1}, ffn: {type: none}}
  near: {mixer: {type: attention, num_heads: 2, window: 3}, ffn: {type: swiglu, width: 8}}
layers: mixture plain full near
"""
LENGTHS = (6, 3, 9)
EXACT = {"rtol": 0, "atol": 1e-12}


def make(text: str = HYBRID, **options: Any) -> LanguageModel:
    model = build_model(ModelConfig.from_yaml(text), dtype=torch.float64, **options)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    return model


def texts() -> list[torch.Tensor]:
    return [torch.randint(11, (length,)) for length in LENGTHS]


def pad(parts: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded with tokens that are none."""
    longest = max(LENGTHS)
    tokens = torch.full((len(parts), longest), -100)
    for row, part in zip(tokens, parts, strict=True):
        row[longest - len(part) :] = part if side == "left" else row[longest - len(part) :]
        row[: len(part)] = part if side == "right" else row[: len(part)]
    return tokens, tokens >= 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_the_texts_alone(side: str) -> None:
    model, parts = make(), texts()
    tokens, mask = pad(parts, side)
    logits = model(tokens, padding_mask=mask)
    for row, part in enumerate(parts):
        torch.testing.assert_close(logits[row, mask[row]], model(part[None])[0], **EXACT)
    assert bool((logits[~mask] == 0).all())


def test_pads_are_in_no_statistic() -> None:
    model = make()
    routers = [module for module in model.modules() if isinstance(module, (MoMLayer, MixtureOfExperts))]
    tokens, mask = pad([torch.randint(11, (5,)), torch.randint(11, (0,))], "left")

    def statistics() -> list[torch.Tensor]:
        return [value for r in routers for value in (r.routing.load, r.routing.balance_loss)]  # type: ignore[union-attr]

    model(tokens[:1, -5:])
    alone = statistics()
    model(tokens, padding_mask=mask)
    assert len(alone) == 4
    for value, expected in zip(statistics(), alone, strict=True):
        torch.testing.assert_close(value, expected)


def test_packed_documents_equal_the_texts_alone_and_go_on() -> None:
    model, parts = make(), texts()
    borders = torch.tensor([0, *itertools.accumulate(LENGTHS)])
    state = model.new_state(len(parts))
    packed = torch.cat(parts)[None]
    logits = model(packed, cu_seqlens=borders, state=state)
    for bound in (None, max(LENGTHS)):
        torch.testing.assert_close(model(packed, cu_seqlens=borders, max_length=bound), logits, **EXACT)
    more = torch.randint(11, (len(parts), 2))
    with torch.no_grad():
        steps = torch.cat([model(more[:, t : t + 1], state=state) for t in range(2)], 1)
    for row, (part, document) in enumerate(zip(parts, logits[0].split(LENGTHS), strict=True)):
        alone = model(torch.cat((part, more[row]))[None])[0]
        torch.testing.assert_close(torch.cat((document, steps[row])), alone, **EXACT)


@pytest.mark.parametrize("cuts", [(0, 4, 9), tuple(range(10))])
def test_training_equals_any_split_in_evaluation(cuts: tuple[int, ...]) -> None:
    model = make().train()
    tokens = torch.randint(11, (2, 9))
    whole = model(tokens)
    model.eval()
    state = model.new_state(2)
    with torch.no_grad():
        pieces = [model(tokens[:, start:stop], state=state) for start, stop in itertools.pairwise(cuts)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, **EXACT)
    assert state.tokens_seen.tolist() == [9, 9]


def test_the_future_gives_no_gradient_in_training() -> None:
    model = make().train()
    for module in model.modules():
        if isinstance(module, Router):
            module.balance_weight = 0.0  # the balance loss does look at the whole batch
    seen: list[torch.Tensor] = []
    model.embedding.register_forward_hook(lambda module, inputs, output: seen.append(output))
    logits = model(torch.randint(11, (1, 9)))
    (gradient,) = torch.autograd.grad(logits[:, :5].square().sum(), seen[0])
    assert bool((gradient[:, :5] != 0).all())
    assert bool((gradient[:, 5:] == 0).all())


def test_every_parameter_learns() -> None:
    model = make().train()
    tokens = torch.randint(11, (4, 12))
    torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_auxiliary_losses_are_attached_or_collected() -> None:
    tokens = torch.randint(11, (2, 6))
    attached, collected = make(), make(auxiliary="collect")
    collected.load_state_dict(attached.state_dict())
    attached(tokens).sum().backward()
    (collected(tokens).sum() + collect_auxiliary_losses(collected)).backward()
    assert [index for index, _ in attached.memory_layers()] == [0]
    for (name, parameter), other in zip(attached.named_parameters(), collected.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=0, atol=1e-10, msg=name)


def test_a_state_is_saved_read_reordered_and_cut(tmp_path: Path) -> None:
    model = make()
    tokens = torch.randint(11, (3, 7))
    state = model.new_state(3)
    model(tokens[:, :5], state=state)
    file = tmp_path / "state.pt"
    state.save(file)
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]
    read = ModelState.load(file)
    assert read.nbytes == state.nbytes
    order = torch.tensor([2, 0, 2])
    with torch.no_grad():
        expected = model(tokens)[order, 5:]
        for copy in (read, state.detach(), state.clone()):
            torch.testing.assert_close(model(tokens[order, 5:], state=copy.select(order)), expected, **EXACT)
    assert state.tokens_seen.tolist() == [5, 5, 5]
    assert not any(tensor.requires_grad for tensor in state.detach().tensors().values())


def test_a_file_that_holds_no_state(tmp_path: Path) -> None:
    torch.save({"format": 99}, tmp_path / "other.pt")
    (tmp_path / "words.txt").write_text("words")
    for name in ("other.pt", "words.txt"):
        with pytest.raises(ValueError, match=f"holds no model state of format {STATE_FORMAT}"):
            ModelState.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        ModelState.load(tmp_path / "missing.pt")


def test_a_refused_state_is_not_touched() -> None:
    model, tokens = make(), torch.randint(11, (2, 4))
    other = make(HYBRID.replace("window: 3", "window: 4"))
    with pytest.raises(ValueError, match="state belongs to a model of another configuration"):
        model(tokens, state=other.new_state(2))
    state = model.new_state(3)
    with pytest.raises(ValueError, match="state is of 3 sequences, this call has 2"):
        model(tokens, state=state)
    with pytest.raises(ValueError, match="state is of 3 sequences, this call has 1"):
        model(tokens[:1], cu_seqlens=torch.tensor([0, 4]), state=state)
    with pytest.raises(ValueError, match="state must be a ModelState"):
        model(tokens, state=state.layers[0])
    assert state.tokens_seen.tolist() == [0, 0, 0]


def test_bad_tokens_are_named() -> None:
    model, tokens = make(), torch.randint(11, (2, 4))
    with pytest.raises(ValueError, match=r"tokens must be int32 or int64 of shape \[B, T\], got torch.float32"):
        model(tokens.float())
    with pytest.raises(ValueError, match=r"tokens must be in \[0, vocab_size = 11\), got 11"):
        model(torch.full((1, 2), 11))
    with pytest.raises(ValueError, match="padding_mask must be bool of shape"):
        model(tokens, padding_mask=torch.ones(2, 3).bool())
    with pytest.raises(ValueError, match="pass one"):
        model(tokens[:1], padding_mask=torch.ones(1, 4).bool(), cu_seqlens=torch.tensor([0, 4]))


def test_tied_embeddings_are_one_matrix() -> None:
    free, tied = make(), make(HYBRID + "tie_embeddings: true\n")
    assert free.num_parameters() - tied.num_parameters() == 16 * 11
    assert [name for name in tied.state_dict() if name.startswith("head")] == []
    tokens = torch.randint(11, (1, 5))
    expected = tied.hidden(tokens) @ tied.embedding.weight.T
    torch.testing.assert_close(tied(tokens), expected, **EXACT)


def test_initial_spread() -> None:
    config = ModelConfig.from_yaml(HYBRID.replace("vocab_size: 11", "vocab_size: 5000"))
    model = build_model(config)
    for weight in (model.embedding.weight, model.head.weight):  # type: ignore[union-attr]
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    assert bool((model.norm.weight == 1).all())


@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_trains(autocast: bool) -> None:
    model = build_model(ModelConfig.from_yaml(HYBRID), dtype=None if autocast else torch.bfloat16)
    tokens = torch.randint(11, (2, 6))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(tokens)
    assert logits.dtype == torch.bfloat16
    logits.float().logsumexp(-1).sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_repr_tells_what_it_is() -> None:
    model = make("name: small\n" + HYBRID)
    text = repr(model)
    assert "name=small, layers='mixture plain full near', parameters=" in text
    assert f"active={model.num_active_parameters():,}" in text


def test_no_tokens() -> None:
    model = make()
    state = model.new_state(2)
    assert model(torch.zeros(2, 0, dtype=torch.int64), state=state).shape == (2, 0, 11)
    assert state.tokens_seen.tolist() == [0, 0]


@pytest.mark.parametrize("tied", [False, True])
def test_logits_and_loss_of_some_places(tied: bool) -> None:
    model = make(HYBRID + f"tie_embeddings: {str(tied).lower()}\n")
    tokens = torch.randint(11, (2, 7))
    places, labels = torch.tensor([12, 0, 5]), torch.tensor([1, 10, 4])
    logits = model(tokens).flatten(0, 1)[places]
    torch.testing.assert_close(model(tokens, places=places), logits, **EXACT)
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(model(tokens, places=places, labels=labels), loss, **EXACT)
    everywhere = torch.arange(14)
    of_all = {"labels": everywhere % 11}
    torch.testing.assert_close(model(tokens, **of_all), model(tokens, places=everywhere, **of_all), **EXACT)
    for wrong, of in (({"labels": labels}, "tokens"), ({"labels": labels[:2], "places": places}, "places")):
        with pytest.raises(ValueError, match=f"labels must be one for each of the {of}"):
            model(tokens, **wrong)


@torch.no_grad()
def test_a_text_over_an_attention_layers_limit_is_refused_before_any_layer_has_read_it() -> None:
    model = make(HYBRID.replace("window: 3", "window: 3, max_length: 4")).eval()
    index = next(i for i, block in enumerate(model.blocks) if getattr(block.mixer, "max_length", None) == 4)
    message = f"the attention of layer {index} takes sequences of at most max_length = 4 tokens, got one of 5"
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(1, 5, dtype=torch.int64))
    state = model.new_state(1)
    model(torch.zeros(1, 3, dtype=torch.int64), state=state)
    before = state.clone()
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(1, 2, dtype=torch.int64), state=state)
    for layer, old in zip(state.layers, before.layers, strict=True):
        assert all(torch.equal(x, old.tensors()[name]) for name, x in layer.tensors().items())
