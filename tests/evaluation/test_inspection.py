"""What a text's tokens went to: the routers' own picks, however the text was read."""

from __future__ import annotations

import pytest
import torch
from checkpoints import ATTENTION, MIXTURE, small_model
from hypothesis import given
from hypothesis import strategies as st

from linear_moe.data.text import DOCUMENT_START
from linear_moe.evaluation import Sizes, inspect_text
from linear_moe.evaluation.token_names import CONTINUED, START, byte_labels, byte_name

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


@given(
    st.lists(st.one_of(st.binary(max_size=4), st.text(max_size=3).map(lambda s: s.encode()), st.none()), max_size=12)
)
def test_each_byte_has_a_label(parts: list[bytes | None]) -> None:
    tokens = [t for part in parts for t in ([DOCUMENT_START] if part is None else part)]
    labels = byte_labels(tokens)
    assert len(labels) == len(tokens)
    assert [i for i, t in enumerate(tokens) if t == DOCUMENT_START] == [
        i for i, label in enumerate(labels) if label == START and tokens[i] > 255
    ]
    assert all(label.isprintable() and label for label in labels)
    assert all(byte_name(t).isprintable() and byte_name(t).strip() for t in tokens)


def test_labels_are_characters_where_there_are_any() -> None:
    text = "aé€😀".encode()
    assert byte_labels([*text]) == ["a", "é", CONTINUED, "€", *CONTINUED * 2, "😀", *CONTINUED * 3]
    assert byte_labels([0xC3, 0xFF, 0x41, 0xE2, 0x82]) == ["\\xc3", "\\xff", "A", "\\xe2", "\\x82"]
    # A character does not reach over a document start.
    assert byte_labels([0xC3, DOCUMENT_START, 0xA9]) == ["\\xc3", START, "\\xa9"]
    assert byte_labels([*b"\n\t\0"]) == ["⏎", "⇥", "\\u0000"]
    # What would turn the direction of a line is named, not done.
    assert byte_labels([*"\u202e".encode()])[0] == "\\u202e"
    assert [byte_name(t) for t in (0x20, 0x0A, 0x41, 0xFF)] == ["space", "line end", "A", "\\xff"]
