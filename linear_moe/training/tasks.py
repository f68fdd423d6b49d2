"""What a model is trained on: the batches of each step, and the score on data it has not seen."""

from __future__ import annotations

import functools
import hashlib
import math
import sys
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from linear_moe.data.batch import IGNORE_INDEX, Batch, seeded
from linear_moe.data.mqar import MQAR, mqar_batch
from linear_moe.data.text import TextCorpus, printable
from linear_moe.data.text_batches import PackedText, held_out_batches
from linear_moe.data.text_stream import DocumentStream, PackedStream, first_documents
from linear_moe.data.tokenizer import BYTES, Tokenizer
from linear_moe.models.model import LanguageModel
from linear_moe.rules.base import upcast

HELD_OUT_STREAM = 1 << 62
"""Seed of held-out recall problems: the same for every run, and no seed of training."""
EVALUATION_TOKENS = 8192
"""Of a batch of held-out recall problems, about."""
EVALUATION_ROW = 1024
"""Tokens of a packed row of held-out text, at least: attention pays for every pair of a row, documents apart or not."""
SAMPLE_TOKENS = 300


class Task(Protocol):
    """A task a model is trained on."""

    score_name: str
    """The entry of `evaluate` that stands for the whole."""
    context: int
    """Tokens of a sequence, at most."""

    def describe(self) -> str:
        """One line for people."""

    def batch(self, index: int) -> Batch:
        """Training batch `index`, a function of it alone, so that a resumed run sees what it would have seen."""

    def state(self) -> dict[str, Any]:
        """Where it is in its data, as plain data and tensors; empty if `batch` depends on its index alone."""

    def load_state(self, state: dict[str, Any]) -> str | None:
        """Go on from where `state` was taken; says so if its data is no longer what it was then."""

    def files(self) -> dict[str, bytes]:
        """What a checkpoint needs beside the model for its tokens to mean something, by file name."""

    def evaluate(self, model: LanguageModel) -> dict[str, float]:
        """Scores on held-out data, by name."""

    def sample(self, model: LanguageModel) -> str | None:
        """Something the model says, if the task has words."""


class IndexedTask:
    """A task whose batches depend on their index alone: it has no place to keep."""

    def state(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state(self, state: dict[str, Any]) -> str | None:
        """Nothing to go back to."""
        return None

    def files(self) -> dict[str, bytes]:
        """None."""
        return {}


class RecallTask(IndexedTask):
    """Multi-query associative recall: fresh problems every step, accuracy on problems that are never trained on.

    Args:
        problems: kinds of problems.
        weights: how often each kind is drawn, in proportion; alike if None.
        batch_size: sequences of a batch.
        seed: of the training problems.
        held_out_size: sequences of each kind in the score.
        held_out_problems: kinds in the score, `problems` if None.

    Raises:
        ValueError: naming the argument that does not fit.
    """

    score_name = "accuracy"

    def __init__(
        self,
        problems: Sequence[MQAR],
        *,
        weights: Sequence[float] | None = None,
        batch_size: int = 64,
        seed: int = 0,
        held_out_size: int = 1000,
        held_out_problems: Sequence[MQAR] | None = None,
    ) -> None:
        if not problems:
            raise ValueError("problems must name at least one kind of problem, got none")
        for name, value in (("batch_size", batch_size), ("held_out_size", held_out_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.problems = list(problems)
        self.context = max(problem.length for problem in problems)
        self.weights = torch.tensor([1.0] * len(problems) if weights is None else list(weights), dtype=torch.float64)
        self.batch_size = batch_size
        self.seed = seed
        self.held_out_size = held_out_size
        self.held_out_problems = self.problems if held_out_problems is None else list(held_out_problems)

    def describe(self) -> str:
        """The sizes."""
        kinds = ", ".join(f"{problem.num_pairs} pairs in {problem.length} tokens" for problem in self.problems)
        return f"recall of {kinds}, vocabulary {self.problems[0].vocab_size:,}, {self.batch_size} sequences a batch"

    def batch(self, index: int) -> Batch:
        """Fresh problems, of one kind."""
        generator = seeded(self.seed, index)
        kind = 0
        if len(self.problems) > 1:
            kind = int(torch.multinomial(self.weights, 1, generator=generator))
        return mqar_batch(self.problems[kind], self.batch_size, generator)

    def evaluate(self, model: LanguageModel) -> dict[str, float]:
        """`accuracy`, and for several kinds of problems each one's."""
        scores = {}
        for kind, problem in enumerate(self.held_out_problems):
            generator = seeded(HELD_OUT_STREAM, kind)
            # Not by the run's batch size, on which the problems that are drawn would then depend.
            size = max(EVALUATION_TOKENS // problem.length, 1)
            right = asked = 0
            for start in range(0, self.held_out_size, size):
                batch = mqar_batch(problem, min(size, self.held_out_size - start), generator)
                right += int(recalled(model, batch).sum())
                asked += batch.num_labels
            scores[f"accuracy {problem.length}/{problem.num_pairs}"] = right / asked
        mean = sum(scores.values()) / len(scores)
        return {"accuracy": mean} if len(scores) == 1 else {"accuracy": mean, **scores}

    def sample(self, model: LanguageModel) -> str | None:
        """One problem: what was asked, the answer, the model's."""
        batch = mqar_batch(self.held_out_problems[0], 1, seeded(HELD_OUT_STREAM, -1))
        right = recalled(model, batch).tolist()
        asked = batch.tokens[batch.labels != IGNORE_INDEX].tolist()
        answers = batch.labels[batch.labels != IGNORE_INDEX].tolist()
        return "  ".join(
            f"{a} -> {b} {'right' if r else 'wrong'}" for a, b, r in zip(asked, answers, right, strict=True)
        )


class HeldOutText:
    """Documents that are scored and never learned from.

    Args:
        documents: as bytes.
        tokenizer: of the model.
        context: tokens of a segment, at most.
        limit: at most this many bytes are scored.

    Raises:
        ValueError: if the limit is below 1.
    """

    def __init__(self, documents: Sequence[bytes], tokenizer: Tokenizer, *, context: int, limit: int) -> None:
        if limit < 1:
            raise ValueError(f"held_out_bytes must be at least 1, got {limit}")
        self.documents = _first_bytes(documents, limit)
        self.tokenizer = tokenizer
        self.context = context

    def evaluate(self, model: LanguageModel) -> dict[str, float]:
        """`bits_per_byte`, which tokenisers can be compared by, and `perplexity` a token."""
        nats, count = 0.0, 0
        tokens = max(self.context, EVALUATION_ROW)
        batches = held_out_batches(
            self.documents, context=self.context, batch_tokens=tokens, limit=sys.maxsize, tokenizer=self.tokenizer
        )
        for batch in batches:
            logits = evaluated(model, batch)
            labels = batch.labels[0].to(logits.device)
            nats += float(nn.functional.cross_entropy(upcast(logits[0]), labels, reduction="sum"))
            count += labels.numel()
        size = sum(map(len, self.documents))
        return {"bits_per_byte": nats / size / math.log(2), "perplexity": math.exp(min(nats / count, 700.0))}


class TextTask(IndexedTask):
    """Text in memory: the next token of every token, and bits per byte on held-out documents.

    Args:
        corpus: the documents.
        context: tokens of a segment, at most; longer documents are cut: see `PackedText`.
        batch_tokens: tokens of a batch.
        seed: of the order of the documents.
        held_out_bytes: at most this much of the held-out text is scored.
        tokenizer: bytes unless given.

    Raises:
        ValueError: naming the argument that does not fit.
    """

    score_name = "bits_per_byte"

    def __init__(
        self,
        corpus: TextCorpus,
        *,
        context: int = 512,
        batch_tokens: int = 4096,
        seed: int = 0,
        held_out_bytes: int = 100_000,
        tokenizer: Tokenizer = BYTES,
    ) -> None:
        self.corpus = corpus
        self.context = context
        self.tokenizer = tokenizer
        self.held_out = HeldOutText(corpus.held_out, tokenizer, context=context, limit=held_out_bytes)
        self.packed = PackedText(
            corpus.train, context=context, batch_tokens=batch_tokens, seed=seed, tokenizer=tokenizer
        )

    def describe(self) -> str:
        """The source and the sizes."""
        corpus = self.corpus
        return (
            f"{corpus.source}: {corpus.num_train_bytes:,} bytes in {len(corpus.train):,} documents to learn from, "
            f"{corpus.num_held_out_bytes:,} in {len(corpus.held_out):,} held out; segments of up to {self.context} tokens"
        )

    def batch(self, index: int) -> Batch:
        """One packed row."""
        return self.packed.batch(index)

    def state(self) -> dict[str, Any]:
        """Which text it is: the place follows from the step."""
        return {"text": self._digest}

    def load_state(self, state: dict[str, Any]) -> str | None:
        """Whether it is another text."""
        if state == self.state():
            return None
        return f"the text of {self.corpus.source} is not what the run began with: it goes on with what is there now"

    def files(self) -> dict[str, bytes]:
        """The tokeniser's."""
        return self.tokenizer.files()

    def evaluate(self, model: LanguageModel) -> dict[str, float]:
        """`bits_per_byte` of the model, and of the byte frequencies of the training text; `perplexity` a token."""
        return {
            **self.held_out.evaluate(model),
            "unigram_bits_per_byte": self._unigram,
        }

    # Once: they look at every byte of the text.

    @functools.cached_property
    def _unigram(self) -> float:
        return self.corpus.unigram_bits_per_byte()

    @functools.cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        for document in self.corpus.train:
            digest.update(len(document).to_bytes(8, "little") + document)
        return digest.hexdigest()

    def sample(self, model: LanguageModel) -> str | None:
        """What the model writes from a document's start."""
        return printable(sample_text(model, max_new_tokens=SAMPLE_TOKENS, tokenizer=self.tokenizer))


class StreamTask:
    """Text from a stream, read as it is needed; its first documents are held out.

    Args:
        stream: of documents.
        context: tokens of a segment, at most.
        batch_tokens: tokens of a batch.
        held_out_documents: so many of the first documents are scored and never learned from.
        held_out_bytes: at most this much of them is scored.
        seed: of the draws from the pieces that wait.
        tokenizer: bytes unless given.

    Raises:
        ValueError: naming the argument that does not fit, or if the stream has no text.
    """

    score_name = "bits_per_byte"

    def __init__(
        self,
        stream: DocumentStream,
        *,
        context: int = 512,
        batch_tokens: int = 4096,
        held_out_documents: int = 100,
        held_out_bytes: int = 100_000,
        seed: int = 0,
        tokenizer: Tokenizer = BYTES,
    ) -> None:
        if held_out_documents < 1:
            raise ValueError(f"held_out_documents must be at least 1, got {held_out_documents}")
        self.stream = stream
        self.context = context
        self.tokenizer = tokenizer
        first = first_documents(stream, held_out_documents)
        self.held_out = HeldOutText(first, tokenizer, context=context, limit=held_out_bytes)
        self.packed = PackedStream(
            stream,
            context=context,
            batch_tokens=batch_tokens,
            held_out=held_out_documents,
            seed=seed,
            tokenizer=tokenizer,
        )

    def describe(self) -> str:
        """The source."""
        held_out = self.held_out.documents
        return (
            f"{self.stream.source}, streamed; its first documents are held out, {sum(map(len, held_out)):,} bytes of "
            f"{len(held_out):,} scored; segments of up to {self.packed.context} tokens"
        )

    def batch(self, index: int) -> Batch:
        """One packed row; the rows before it have been made by then, or are passed over."""
        return self.packed.batch(index)

    def state(self) -> dict[str, Any]:
        """The place in the stream, and the pieces that have been read and not learned from."""
        return self.packed.state()

    def load_state(self, state: dict[str, Any]) -> str | None:
        """Go on from there."""
        self.packed.load_state(state)
        return None

    def files(self) -> dict[str, bytes]:
        """The tokeniser's."""
        return self.tokenizer.files()

    def evaluate(self, model: LanguageModel) -> dict[str, float]:
        """`bits_per_byte`, and `perplexity` a token."""
        return self.held_out.evaluate(model)

    def sample(self, model: LanguageModel) -> str | None:
        """What the model writes from a document's start."""
        return printable(sample_text(model, max_new_tokens=SAMPLE_TOKENS, tokenizer=self.tokenizer))


def evaluated(model: LanguageModel, batch: Batch) -> Tensor:
    """Logits `[B, T, vocabulary]` of a batch, in evaluation mode and without gradients."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            on_device = batch.to(next(model.parameters()).device)
            return model(on_device.tokens, cu_seqlens=on_device.cu_seqlens, max_length=on_device.max_length)
    finally:
        model.train(was_training)


def recalled(model: LanguageModel, batch: Batch) -> Tensor:
    """`[labels]` bool on the CPU: whether each labelled position's likeliest token is its label."""
    labelled = batch.labels != IGNORE_INDEX
    guesses = evaluated(model, batch).argmax(-1).cpu()
    return guesses[labelled] == batch.labels[labelled]


def sample_text(
    model: LanguageModel,
    prompt: bytes = b"",
    *,
    max_new_tokens: int,
    temperature: float = 0.8,
    seed: int = 0,
    tokenizer: Tokenizer = BYTES,
) -> str:
    """The prompt and what the model adds to it."""
    (tokens,) = tokenizer.encode([prompt])
    written = model.generate(
        tokens.long()[None].to(next(model.parameters()).device),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        stop_token=tokenizer.document_start,
    )
    return tokenizer.decode(written[0].tolist())


def check_text_vocabulary(vocab_size: int, name: str) -> None:
    """Raises ValueError unless a model's vocabulary is that of text as bytes."""
    BYTES.check_model(vocab_size, name)


def _first_bytes(documents: Sequence[bytes], limit: int) -> list[bytes]:
    """The documents up to `limit` bytes, the last one cut where a character begins."""
    taken: list[bytes] = []
    for document in documents:
        border = min(limit, len(document))
        while 0 < border < len(document) and document[border] & 0xC0 == 0x80:
            border -= 1
        if border:
            taken.append(document[:border])
        limit -= border
        if border < len(document):
            break
    # Even where the limit is less than its first character.
    return taken or [document for document in documents if document][:1]
