"""Decoding by context: what is measured, on what state, and how large that is."""

from __future__ import annotations

import pytest
import torch
from checkpoints import ATTENTION, MIXTURE, small_model

from linear_moe.evaluation import Sizes, decode_speed, decoding_by_context
from linear_moe.models import DecodeStep


def test_memories_keep_their_size_and_attention_grows_by_the_token() -> None:
    near = {**ATTENTION, "window": 8}
    models = {"memories": small_model(20, MIXTURE, near), "attention": small_model(20, MIXTURE, ATTENTION)}
    result = decoding_by_context(models, lengths=[64, 8, 32], num_tokens=5, batch_size=2)
    sizes = {name: [row["state_bytes"] for row in result.rows if row["model"] == name] for name in models}
    assert [row["context"] for row in result.rows] == [8, 32, 64] * 2
    assert len(set(sizes["memories"])) == 1
    column = models["attention"].new_state(2).layers[1].bytes_per_column * 2  # type: ignore[union-attr]
    assert [b - a for a, b in zip(sizes["attention"], sizes["attention"][1:], strict=False)] == [
        24 * column,
        32 * column,
    ]
    assert all(row["ms_per_token"] >= row["fastest_ms"] > 0 and row["read_per_s"] > 0 for row in result.rows)
    assert all(row["peak_mib"] is None for row in result.rows)
    assert "has a state of one size" in result.remarks[0] and "1.00 times the state" in result.remarks[0]
    assert "has full attention, whose state grows" in result.remarks[1]


def test_the_context_is_read_once_and_each_length_decoded_from_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    model, states, told = small_model(20), [], []
    real = DecodeStep.__init__

    def spy(self: DecodeStep, model: object, state: object, **options: object) -> None:
        states.append(state.clone())  # type: ignore[attr-defined]
        real(self, model, state, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(decode_speed.DecodeStep, "__init__", spy)
    read: list[torch.Tensor] = []
    hidden = type(model).hidden

    def noted(self: object, tokens: torch.Tensor, **options: object) -> torch.Tensor:
        read.append(tokens.clone())
        return hidden(self, tokens, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(type(model), "hidden", noted)
    decoding_by_context(
        {"m": model}, lengths=(10, 25), num_tokens=5, sizes=Sizes(segment=8), track=lambda *at: told.append(at)
    )
    assert [state.tokens_seen.tolist() for state in states] == [[10], [25]]
    assert [part.shape[1] for part in read if part.shape[1] > 1] == [8, 2, 8, 7]
    assert told == [(8, 25), (10, 25), (18, 25), (25, 25)]
    # The second state is that of the whole text: what was decoded between is no part of it.
    whole = model.new_state(1)
    with torch.no_grad():
        hidden(model, torch.cat([part for part in read if part.shape[1] > 1], 1), state=whole)
    for name, tensor in whole.tensors().items():
        torch.testing.assert_close(states[1].tensors()[name], tensor, rtol=1e-4, atol=1e-5)


def test_bad_arguments_are_named() -> None:
    models = {"m": small_model(20)}
    for options, message in (
        ({"lengths": [0, 5]}, "lengths must name contexts of at least one token"),
        ({"num_tokens": 4}, "num_tokens must be at least 5, got 4"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            decoding_by_context(models, **options)  # type: ignore[arg-type]
