"""Streams: every document once a round, and a place that can be gone back to."""

from __future__ import annotations

import io
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linear_moe.data.batch import Batch
from linear_moe.data.text import DOCUMENT_START
from linear_moe.data.text_stream import HubStream, PackedStream, first_documents


class ListStream:
    """A list as a stream."""

    source = "a list"

    def __init__(self, texts: list[bytes]) -> None:
        self.texts = texts
        self.next = 0

    def documents(self) -> Iterator[bytes]:
        while self.next < len(self.texts):
            self.next += 1
            yield self.texts[self.next - 1]

    def place(self) -> dict[str, Any]:
        return {"next": self.next}

    def go_to(self, place: dict[str, Any] | None) -> None:
        self.next = 0 if place is None else place["next"]


def _reloaded(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)  # type: ignore[no-any-return]


def _same(one: Batch, other: Batch) -> bool:
    assert one.cu_seqlens is not None and other.cu_seqlens is not None
    assert one.max_length == other.max_length
    return all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))  # type: ignore[arg-type]


@settings(max_examples=40)
@given(
    st.lists(st.binary(min_size=1, max_size=30), min_size=2, max_size=6),
    st.integers(1, 12),
    st.integers(1, 20),
    st.integers(1, 9),
    st.data(),
)
def test_a_stream_goes_on_from_its_state_as_if_it_had_not_stopped(
    texts: list[bytes], context: int, batch_tokens: int, shuffled: int, data: st.DataObject
) -> None:
    def packed() -> PackedStream:
        return PackedStream(
            ListStream(texts), context=context, batch_tokens=batch_tokens, held_out=1, shuffled=shuffled, seed=3
        )

    whole, parts = packed(), packed()
    for index in range(8):
        assert _same(whole.batch(index), parts.batch(index))
        if data.draw(st.booleans()):
            state = _reloaded(parts.state())
            parts = packed()
            parts.load_state(state)
    skipping = packed()
    assert _same(skipping.batch(8), whole.batch(8))


def test_every_token_is_learned_from_once_a_round_and_held_out_ones_never() -> None:
    texts = [bytes([i]) * (i % 7 + 1) for i in range(40)]
    total = sum(map(len, texts[5:]))
    packed = PackedStream(ListStream(texts), context=4, batch_tokens=total, held_out=5, shuffled=6)
    seen: Counter[int] = Counter()
    for index in range(3):
        batch = packed.batch(index)
        assert batch.cu_seqlens is not None and batch.max_length is not None
        assert int(batch.cu_seqlens.diff().max()) <= batch.max_length
        assert int(batch.cu_seqlens[-1]) == total
        for start, end in itertools.pairwise(batch.cu_seqlens.tolist()):
            assert 1 <= end - start <= 4
            labels = set(batch.labels[0, start:end].tolist())
            assert len(labels) == 1
            assert set(batch.tokens[0, start:end].tolist()) <= labels | {DOCUMENT_START}
        seen.update(batch.labels[0].tolist())
    assert not set(range(5)) & seen.keys()
    # Six pieces of at most four tokens may be ahead.
    assert all(abs(seen[i] - 3 * len(texts[i])) <= 24 for i in range(5, 40))
    assert sum(seen.values()) == 3 * total


def test_a_piece_that_crosses_a_batchs_end_goes_on_in_the_next() -> None:
    packed = PackedStream(ListStream([b"abcdef"]), context=6, batch_tokens=4, shuffled=1)
    first, second = packed.batch(0), packed.batch(1)
    assert first.labels.tolist() == [list(b"abcd")]
    assert second.tokens[0, :2].tolist() == list(b"de")
    assert second.labels[0, :2].tolist() == list(b"ef")


def test_streams_that_can_not_be() -> None:
    with pytest.raises(ValueError, match="a list has no text to learn from beyond 2 documents held out"):
        PackedStream(ListStream([b"a", b"b"]), context=1, batch_tokens=1, held_out=2).batch(0)
    with pytest.raises(ValueError, match="a list has no text"):
        first_documents(ListStream([]), 3)
    with pytest.raises(ValueError, match="context must be at least 1, got 0"):
        PackedStream(ListStream([b"a"]), context=0, batch_tokens=1)
    packed = PackedStream(ListStream([b"abc"]), context=3, batch_tokens=1)
    packed.batch(2)
    with pytest.raises(ValueError, match="can't go back: batch 2 was asked for, the next one is 3"):
        packed.batch(2)


def test_a_dataset_is_streamed_and_gone_back_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "data"
    folder.mkdir()
    for part in range(2):
        rows = [{"text": f"document {i}" * (i % 3)} for i in range(part * 10, part * 10 + 10)]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stream = HubStream(str(folder))
    every = list(stream.documents())
    assert every == [(f"document {i}" * (i % 3)).encode() for i in range(20) if i % 3]
    for count in (1, 4, 9):
        stream.go_to(None)
        taken = list(itertools.islice(stream.documents(), count))
        place = _reloaded(stream.place())
        other = HubStream(str(folder))
        other.go_to(place)
        assert taken + list(other.documents()) == every

    with (folder / "1.jsonl").open("a") as file:
        file.write('{"text": null}\n')
    with pytest.raises(ValueError, match=r"row 21 of .*data \(train\) has no text: its 'text' is null"):
        list(HubStream(str(folder)).documents())
    with pytest.raises(ValueError, match="row 1 of .* it has no 'body'"):
        list(HubStream(str(folder), text_key="body").documents())
    with pytest.raises(ValueError, match=r"the dataset .*nowhere \(train\) can't be had"):
        HubStream(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="can't be had"):
        HubStream(str(folder), split="valid")
