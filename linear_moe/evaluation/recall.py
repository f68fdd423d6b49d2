"""Multi-query associative recall by the size of the problem."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from linear_moe.data.batch import IGNORE_INDEX, seeded
from linear_moe.data.mqar import MQAR, ZOOLOGY_TEST, mqar_batch
from linear_moe.evaluation.result import Column, Result, Track, untracked
from linear_moe.evaluation.segments import Sizes, hidden_in_segments
from linear_moe.models.model import LanguageModel
from linear_moe.training.tasks import EVALUATION_TOKENS, HELD_OUT_STREAM

COLUMNS = (
    Column("length", "tokens", ","),
    Column("num_pairs", "pairs", ","),
    Column("asked", "asked", ","),
    Column("accuracy", "accuracy", ".4f"),
    Column("chance", "a guess", ".4f"),
)


@torch.no_grad()
def recall_by_size(
    model: LanguageModel,
    problems: Sequence[MQAR],
    *,
    num_examples: int = 256,
    sizes: Sizes | None = None,
    track: Track = untracked,
) -> Result:
    """How often the likeliest token is the value of the key that is asked for, by length and number of pairs.

    The problems are those that training holds out: of the same kinds, in the same order, the accuracy is the same.

    Args:
        model: of the problems' vocabulary.
        problems: kinds.
        num_examples: sequences of each kind.
        sizes: how much is done at once; `batch_tokens` is training's, on which the problems depend.
        track: told how far it is.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    sizes = sizes or Sizes()
    if not problems:
        raise ValueError("problems must name at least one kind of problem, got none")
    if num_examples < 1:
        raise ValueError(f"num_examples must be at least 1, got {num_examples}")
    vocab_size, device = model.config.vocab_size, next(model.parameters()).device
    for problem in problems:
        if problem.vocab_size > vocab_size:
            raise ValueError(f"problems need a vocabulary of {problem.vocab_size}, the model has {vocab_size} tokens")
    rows: list[dict[str, Any]] = []
    total, done = num_examples * sum(problem.length for problem in problems), 0
    for kind, problem in enumerate(problems):
        generator = seeded(HELD_OUT_STREAM, kind)
        size = max(EVALUATION_TOKENS // problem.length, 1)
        right = asked = 0
        for start in range(0, num_examples, size):
            batch = mqar_batch(problem, min(size, num_examples - start), generator).to(device)
            for place, hidden in hidden_in_segments(model, batch.tokens, sizes.segment):
                labels = batch.labels[:, place : place + hidden.shape[1]]
                labelled = labels != IGNORE_INDEX
                guesses = model.logits(hidden[labelled]).argmax(-1)
                right += int((guesses == labels[labelled]).sum())
                asked += guesses.numel()
                done += labels.numel()
                track(done, total)
        values = problem.vocab_size - problem.vocab_size // 2
        rows.append(
            {
                "length": problem.length,
                "num_pairs": problem.num_pairs,
                "asked": asked,
                "accuracy": right / asked,
                "chance": 1 / values,
            }
        )
    return Result("mqar", "recall of pairs (MQAR) by the size of the problem", COLUMNS, rows)


def published_problems(vocab_size: int) -> list[MQAR]:
    """The published test problems that fit a vocabulary.

    Raises:
        ValueError: if none does.
    """
    fitting = [(length, pairs) for length, pairs in ZOOLOGY_TEST if vocab_size // 2 - 1 >= pairs]
    if not fitting:
        raise ValueError(f"no published recall problem fits vocab_size = {vocab_size}; name one, such as 16:2")
    return [MQAR(vocab_size, length, pairs) for length, pairs in fitting]


def problem_of(text: str, vocab_size: int) -> MQAR:
    """The problem that "LENGTH:PAIRS" names.

    Raises:
        ValueError: if it names none, or one that can't be.
    """
    length, _, pairs = text.partition(":")
    if not (length.isdecimal() and pairs.isdecimal()):
        raise ValueError(f"a problem is LENGTH:PAIRS, such as 64:14, got {text!r}")
    return MQAR(vocab_size, int(length), int(pairs))
