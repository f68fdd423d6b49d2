"""What a model is trained on: the batches of each step, and the score on data it has not seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from linear_moe.data.batch import IGNORE_INDEX, Batch, seeded
from linear_moe.data.mqar import MQAR, mqar_batch
from linear_moe.data.text import DOCUMENT_START, VOCAB_SIZE, TextCorpus, decode_tokens, printable
from linear_moe.data.text_batches import PackedText, held_out_batches
from linear_moe.models.model import LanguageModel

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

    def describe(self) -> str:
        """One line for people."""

    def batch(self, index: int) -> Batch:
        """Training batch `index`, a function of it alone, so that a resumed run sees what it would have seen."""

    def state(self) -> dict[str, Any]:
        """Where it is in its data, as plain data and tensors; empty if `batch` depends on its index alone."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from where `state` was taken."""

    def evaluate(self, model: LanguageModel) -> dict[str, float]:
        """Scores on held-out data, by name."""

    def sample(self, model: LanguageModel) -> str | None:
        """Something the model says, if the task has words."""


class IndexedTask:
    """A task whose batches depend on their index alone: it has no place to keep."""

    def state(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Nothing to go back to."""


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


class TextTask(IndexedTask):
    """Bytes of text: the next byte of every byte, and bits per byte on held-out documents.

    Args:
        corpus: the documents.
        context: tokens of a segment, at most; longer documents are cut: see `PackedText`.
        batch_tokens: tokens of a batch.
        seed: of the order of the documents.
        held_out_bytes: at most this much of the held-out text is scored.

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
    ) -> None:
        if held_out_bytes < 1:
            raise ValueError(f"held_out_bytes must be at least 1, got {held_out_bytes}")
        self.corpus = corpus
        self.context = context
        self.held_out_bytes = held_out_bytes
        self.packed = PackedText(corpus.train, context=context, batch_tokens=batch_tokens, seed=seed)

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

    def evaluate(self, model: LanguageModel) -> dict[str, float]:
        """`bits_per_byte` of the model, and of the byte frequencies of the training text."""
        nats, count = 0.0, 0
        tokens = max(self.context, EVALUATION_ROW)
        batches = held_out_batches(
            self.corpus.held_out, context=self.context, batch_tokens=tokens, limit=self.held_out_bytes
        )
        for batch in batches:
            logits = evaluated(model, batch)
            labels = batch.labels[0].to(logits.device)
            nats += float(nn.functional.cross_entropy(logits[0].float(), labels, reduction="sum"))
            count += labels.numel()
        return {
            "bits_per_byte": nats / count / math.log(2),
            "unigram_bits_per_byte": self.corpus.unigram_bits_per_byte(),
        }

    def sample(self, model: LanguageModel) -> str | None:
        """What the model writes from a document's start."""
        return printable(sample_text(model, max_new_tokens=SAMPLE_TOKENS))


def evaluated(model: LanguageModel, batch: Batch) -> Tensor:
    """Logits `[B, T, vocabulary]` of a batch, in evaluation mode and without gradients."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            on_device = batch.to(next(model.parameters()).device)
            return model(on_device.tokens, cu_seqlens=on_device.cu_seqlens)
    finally:
        model.train(was_training)


def recalled(model: LanguageModel, batch: Batch) -> Tensor:
    """`[labels]` bool on the CPU: whether each labelled position's likeliest token is its label."""
    labelled = batch.labels != IGNORE_INDEX
    guesses = evaluated(model, batch).argmax(-1).cpu()
    return guesses[labelled] == batch.labels[labelled]


def sample_text(
    model: LanguageModel, prompt: bytes = b"", *, max_new_tokens: int, temperature: float = 0.8, seed: int = 0
) -> str:
    """The prompt and what the model adds to it."""
    device = next(model.parameters()).device
    tokens = torch.tensor([[DOCUMENT_START, *prompt]], device=device)
    written = model.generate(
        tokens, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, stop_token=DOCUMENT_START
    )
    return decode_tokens(written[0].tolist())


def check_text_vocabulary(vocab_size: int, name: str) -> None:
    """Raises ValueError unless a model's vocabulary is that of text: bytes and the document start."""
    if vocab_size != VOCAB_SIZE:
        raise ValueError(
            f"vocab_size of {name} must be {VOCAB_SIZE} for text (256 bytes and a document start), got {vocab_size}"
        )
