"""What a text's tokens went to: the routers' own picks, however the text was read."""

from __future__ import annotations

import pytest
import torch
from checkpoints import ATTENTION, MIXTURE, small_model

from linear_moe.data.text import DOCUMENT_START
from linear_moe.evaluation import Sizes, inspect_text

TEXT = [DOCUMENT_START, *b"to be or not to be, that is the question"]


def test_the_picks_are_the_routers() -> None:
    model = small_model(257, MIXTURE, ATTENTION, {**MIXTURE, "num_memories": 5})
    found = inspect_text(model, TEXT, sizes=Sizes(segment=7))
    with torch.no_grad():
        model(torch.tensor([TEXT]))
    assert [(layer.layer, layer.num_memories) for layer in found.layers] == [(0, 3), (2, 5)]
    assert (found.num_layers, found.tokens) == (3, TEXT)
    for layer, (_, mixture) in zip(found.layers, model.memory_layers(), strict=True):
        assert mixture.routing is not None
        assert layer.picks == mixture.routing.indices.tolist()
        torch.testing.assert_close(torch.tensor(layer.weights), mixture.routing.weights, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.tensor(layer.loads()), mixture.routing.load, rtol=1e-5, atol=1e-6)
        for memory in range(layer.num_memories):
            held = layer.held(TEXT, memory, 999)
            mine = [token for token, picks in zip(TEXT, layer.picks, strict=True) if memory in picks]
            assert sum(token.times for token in held) == len(mine)
            assert all(mine.count(token) == times for token, times, _ in held)
            assert all(share == times / TEXT.count(token) for token, times, share in held)
            assert [times for _, times, _ in held] == sorted((times for _, times, _ in held), reverse=True)
            assert layer.held(TEXT, memory, 2) == held[:2]


def test_a_model_without_mixtures_has_no_picks() -> None:
    found = inspect_text(small_model(257, ATTENTION), TEXT)
    assert found.layers == [] and found.num_layers == 1
    with pytest.raises(ValueError, match="tokens must have at least one token"):
        inspect_text(small_model(), [])
