"""Generation: what a full pass over the text so far would choose, one token at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from linear_moe.models import LanguageModel, ModelConfig, build_model

HYBRID = """\
hidden_size: 16
vocab_size: 11
blocks:
  mixture: {mixer: {type: mom, num_heads: 2, head_dim: 4, num_memories: 3}, ffn: {type: swiglu, width: 8}}
  near: {mixer: {type: attention, num_heads: 2, window: 3}, ffn: {type: moe, num_experts: 3, width: 8}}
layers: mixture near
"""


def make() -> LanguageModel:
    model = build_model(ModelConfig.from_yaml(HYBRID), dtype=torch.float64)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    return model


def slowly(model: LanguageModel, prompt: list[int], count: int) -> list[int]:
    """Greedy, without a state."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_equals_a_full_pass_for_each_token(side: str) -> None:
    model = make()
    prompts = [[1, 2, 3, 4, 5], [7], [3, 3, 9]]
    rows = [[0] * (5 - len(p)) + p if side == "left" else p + [0] * (5 - len(p)) for p in prompts]
    widths = torch.tensor([len(p) for p in prompts])[:, None]
    columns = torch.arange(5)
    mask = columns >= 5 - widths if side == "left" else columns < widths
    output = model.generate(torch.tensor(rows), max_new_tokens=6, padding_mask=mask)
    assert output[:, :5].tolist() == rows
    assert output[:, 5:].tolist() == [slowly(model, prompt, 6) for prompt in prompts]


def test_training_mode_is_given_back_and_no_graph_is_kept() -> None:
    model = make().train()
    output = model.generate(torch.tensor([[1]]), max_new_tokens=0)
    assert output.tolist() == [[1]]
    assert model.training
    assert not output.requires_grad


def test_draws_follow_the_seed_and_top_k() -> None:
    model, prompt = make(), torch.tensor([[1, 2]]).repeat(64, 1)
    options: dict[str, Any] = {"max_new_tokens": 4, "temperature": 2.0}
    first = model.generate(prompt, seed=1, **options)
    assert torch.equal(first, model.generate(prompt, seed=1, **options))
    assert not torch.equal(first, model.generate(prompt, seed=2, **options))
    greedy = model.generate(prompt, max_new_tokens=4)
    assert torch.equal(greedy, model.generate(prompt, seed=1, top_k=1, **options))
    two = set(model.generate(prompt, seed=1, top_k=2, max_new_tokens=1, temperature=100.0)[:, 2].tolist())
    with torch.no_grad():
        assert two == set(model(prompt[:1])[0, -1].topk(2).indices.tolist())


def test_generation_stops_when_all_have_stopped() -> None:
    model = make()
    prompts = torch.tensor([[1, 2], [7, 9], [3, 3]])
    free = model.generate(prompts, max_new_tokens=8)[:, 2:]
    stop = int(free[0, 1])
    held = model.generate(prompts, max_new_tokens=8, stop_token=stop)[:, 2:]
    for row, other in zip(held.tolist(), free.tolist(), strict=True):
        end = other.index(stop) + 1 if stop in other else 8
        assert row == (other[:end] + [stop] * 8)[: len(row)]
    alone = model.generate(prompts[:1], max_new_tokens=8, stop_token=stop)
    assert alone.shape[1] == 2 + free[0].tolist().index(stop) + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0, got -1"),
        ({"temperature": -0.5}, "temperature must be at least 0, got -0.5"),
        ({"temperature": 1.0, "top_k": 0}, "top_k must be at least 1"),
        ({"top_k": 3}, "top_k = 3 would be ignored at temperature 0"),
        ({"stop_token": 11}, r"stop_token must be in \[0, vocab_size = 11\), got 11"),
        ({"padding_mask": torch.tensor([[False, False]])}, "at least one real token, got a row without any"),
        ({"tokens": torch.zeros(1, 0, dtype=torch.int64)}, "at least one prompt of one token"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make().generate(**{"tokens": torch.tensor([[1, 2]]), "max_new_tokens": 2} | options)
