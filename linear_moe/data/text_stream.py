"""Text that is read as it is needed: streams of documents with a place to go back to, and packed batches of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from linear_moe.data.batch import Batch, seeded
from linear_moe.data.rows import TEXT_KEY, text_of
from linear_moe.data.tokenizer import BYTES, Tokenizer
from linear_moe.models.extras import require

SHUFFLED_PIECES = 1024
"""Pieces of text that are waiting to be drawn from."""


class DocumentStream(Protocol):
    """Documents one after another, always in the same order."""

    source: str
    """What the user named."""

    def documents(self) -> Iterator[bytes]:
        """The documents from the place on that was last set; the first at first."""

    def place(self) -> dict[str, Any]:
        """After the document that was last handed out: plain data."""

    def go_to(self, place: dict[str, Any] | None) -> None:
        """What `documents` shall begin with when it is called next; the first document for None."""


class HubStream:
    """A dataset of the `datasets` library, streamed: from a hub, or a folder of JSON lines or Parquet files.

    Args:
        name: of the dataset, or a folder.
        config: of the dataset.
        split: of the dataset.
        text_key: under which a row has its text.

    Raises:
        ValueError: if it can't be had; while it is read, naming the row that has no text.
        MissingExtraError: if `datasets` is not installed.
    """

    def __init__(self, name: str, *, config: str | None = None, split: str = "train", text_key: str = TEXT_KEY) -> None:
        datasets = require("datasets", extra="data")
        self.source = f"{name} ({split})" if config is None else f"{name}, {config} ({split})"
        self._key = text_key
        self._row = 0
        try:
            self._rows: Any = datasets.load_dataset(name, config, split=split, streaming=True)
        except Exception as error:
            # The library raises whatever the reader of that format or the network does.
            raise ValueError(f"the dataset {self.source} can't be had: {error}") from error
        self._start = copy.deepcopy(self._rows.state_dict())

    def documents(self) -> Iterator[bytes]:
        """The rows that have a text of at least a character."""
        for row in self._rows:
            self._row += 1
            text = text_of(row, self._key, f"row {self._row:,} of {self.source}")
            if text:
                yield text

    def place(self) -> dict[str, Any]:
        """The library's own state, and the number of the row."""
        return {"row": self._row, "dataset": copy.deepcopy(self._rows.state_dict())}

    def go_to(self, place: dict[str, Any] | None) -> None:
        """Read from there on."""
        self._row = 0 if place is None else place["row"]
        self._rows.load_state_dict(copy.deepcopy(self._start if place is None else place["dataset"]))


class PackedStream:
    """Batches of a stream: `tokens` `[1, batch_tokens]` with `cu_seqlens`, as `PackedText` makes them of text in memory.

    Documents are cut into pieces of `context` tokens; a piece is drawn at random from the `shuffled` next ones. A stream that
    ends begins anew. Everything it depends on is in its `state`, the waiting pieces among it.

    Args:
        stream: of documents.
        context: tokens of a segment, at most.
        batch_tokens: tokens of a batch.
        held_out: so many of the stream's first documents are passed over.
        seed: of the draws.
        tokenizer: bytes unless given.
        shuffled: pieces that are drawn from; 1 for the stream's own order.

    Raises:
        ValueError: naming the argument that does not fit, or if the stream has no text beyond what is held out.
    """

    def __init__(
        self,
        stream: DocumentStream,
        *,
        context: int,
        batch_tokens: int,
        held_out: int = 0,
        seed: int = 0,
        tokenizer: Tokenizer = BYTES,
        shuffled: int = SHUFFLED_PIECES,
    ) -> None:
        for name, value in (("context", context), ("batch_tokens", batch_tokens), ("shuffled", shuffled)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.context = context
        self.batch_tokens = batch_tokens
        self._stream = stream
        self._held_out = held_out
        self._seed = seed
        self._tokenizer = tokenizer
        self._shuffled = shuffled
        self._documents: Iterator[bytes] | None = None
        self._waiting: list[Tensor] = []
        self._begun: Tensor | None = None
        self._next = self._drawn = 0

    def batch(self, index: int) -> Batch:
        """Batch `index`; batches are made in order, and those between the last one and this are passed over.

        Raises:
            ValueError: if it is one that has been made.
        """
        if index < self._next:
            raise ValueError(f"a stream can't go back: batch {index} was asked for, the next one is {self._next}")
        while True:
            batch = self._make()
            self._next += 1
            if self._next > index:
                return batch

    def state(self) -> dict[str, Any]:
        """Where it is: plain data and tensors."""
        waiting = [piece.int() for piece in self._waiting]
        return {
            "place": None if self._documents is None else self._stream.place(),
            "next": self._next,
            "drawn": self._drawn,
            "waiting": torch.cat(waiting) if waiting else torch.empty(0, dtype=torch.int32),
            "lengths": torch.tensor([piece.numel() for piece in waiting], dtype=torch.int64),
            "begun": None if self._begun is None else self._begun.int().clone(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self._next, self._drawn, self._begun = state["next"], state["drawn"], state["begun"]
        self._waiting = list(state["waiting"].split(state["lengths"].tolist()))
        self._documents = None
        if state["place"] is not None:
            self._stream.go_to(state["place"])
            self._documents = self._stream.documents()

    def _make(self) -> Batch:
        inputs, labels, lengths, missing = [], [], [], self.batch_tokens
        while missing:
            piece = self._begun if self._begun is not None else self._draw()
            taken = min(piece.numel() - 1, missing)
            inputs.append(piece[:taken])
            labels.append(piece[1 : taken + 1])
            lengths.append(taken)
            missing -= taken
            # What is left is the beginning of the next batch; its first token has been predicted.
            self._begun = piece[taken:] if taken < piece.numel() - 1 else None
        borders = torch.tensor([0, *lengths]).cumsum(0)
        return Batch(torch.cat(inputs).long()[None], torch.cat(labels).long()[None], borders, self.context)

    def _draw(self) -> Tensor:
        while len(self._waiting) < self._shuffled:
            self._read()
        place = int(torch.randint(len(self._waiting), (), generator=seeded(self._seed, self._drawn)))
        self._drawn += 1
        self._waiting[place], self._waiting[-1] = self._waiting[-1], self._waiting[place]
        return self._waiting.pop()

    def _read(self) -> None:
        """One more document among the waiting pieces."""
        if self._documents is None:
            self._documents = self._begin()
        document = next(self._documents, None)
        if document is None:
            self._documents = self._begin()
            document = next(self._documents, None)
            if document is None:
                raise ValueError(
                    f"{self._stream.source} has no text to learn from beyond {self._held_out} documents held out"
                )
        (tokens,) = self._tokenizer.encode([document])
        self._waiting += [
            tokens[start : start + self.context + 1].int() for start in range(0, tokens.numel() - 1, self.context)
        ]

    def _begin(self) -> Iterator[bytes]:
        self._stream.go_to(None)
        documents = self._stream.documents()
        for _ in range(self._held_out):
            next(documents, None)
        return documents


def first_documents(stream: DocumentStream, count: int) -> list[bytes]:
    """The stream's first documents, which `PackedStream(held_out=count)` passes over.

    Raises:
        ValueError: if it has none.
    """
    stream.go_to(None)
    documents = [document for _, document in zip(range(count), stream.documents(), strict=False)]
    if not documents:
        raise ValueError(f"{stream.source} has no text")
    return documents
