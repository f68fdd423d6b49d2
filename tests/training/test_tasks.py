"""Scores: what they are on models whose answers are known."""

from __future__ import annotations

import math

import pytest
import torch
from small_models import CORPUS, PROBLEM, recall_task, small_model, text_task

from linear_moe.data.batch import IGNORE_INDEX
from linear_moe.data.mqar import MQAR
from linear_moe.models import LanguageModel
from linear_moe.training.tasks import RecallTask, TextTask, check_text_vocabulary, recalled, sample_text


def _ignorant(model: LanguageModel) -> LanguageModel:
    """All tokens alike."""
    assert model.head is not None
    torch.nn.init.zeros_(model.head.weight)
    return model


def test_bits_per_byte_of_a_model_that_knows_nothing() -> None:
    scores = text_task().evaluate(_ignorant(small_model(vocab_size=257)))
    assert scores["bits_per_byte"] == pytest.approx(math.log2(257), rel=1e-5)
    assert 2 < scores["unigram_bits_per_byte"] < 6


def test_bits_per_byte_do_not_depend_on_how_the_text_is_batched(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(vocab_size=257).double()
    whole = text_task().evaluate(model)
    # 19 bytes a line, 16 a segment: the border of every batch of 16 is a segment's border anyway
    monkeypatch.setattr("linear_moe.training.tasks.EVALUATION_ROW", 1)
    parts = TextTask(CORPUS, context=16, batch_tokens=16).evaluate(model)
    assert parts["bits_per_byte"] == pytest.approx(whole["bits_per_byte"], rel=1e-6)


def test_accuracy_counts_the_likeliest_token_of_each_query(monkeypatch: pytest.MonkeyPatch) -> None:
    task = recall_task()
    batch = task.batch(0)

    def answers(model: LanguageModel, asked: object) -> torch.Tensor:
        right = torch.where(batch.labels == IGNORE_INDEX, 0, batch.labels)
        right[0] = 0
        return torch.nn.functional.one_hot(right, 16).float()

    monkeypatch.setattr("linear_moe.training.tasks.evaluated", answers)
    right = recalled(small_model(), batch)
    assert right.tolist() == [False] * 3 + [True] * 9


def test_recall_scores_are_reproducible_and_near_chance_before_training() -> None:
    problems = [PROBLEM, MQAR(vocab_size=16, length=24, num_pairs=2)]
    task = RecallTask(problems, weights=[1, 3], batch_size=32, held_out_size=100)
    torch.manual_seed(0)
    model = small_model()
    scores = task.evaluate(model)
    assert scores == task.evaluate(model)
    assert set(scores) == {"accuracy", "accuracy 16/3", "accuracy 24/2"}
    assert scores["accuracy"] == pytest.approx((scores["accuracy 16/3"] + scores["accuracy 24/2"]) / 2)
    assert scores["accuracy"] < 0.4
    lengths = [task.batch(index).tokens.shape[1] for index in range(60)]
    assert 30 < lengths.count(24) < 58
    assert model.training


def test_training_problems_are_not_the_held_out_ones() -> None:
    task = recall_task()
    assert not torch.equal(task.batch(0).tokens, task.batch(1).tokens)
    assert torch.equal(task.batch(1).tokens, recall_task().batch(1).tokens)
    assert not torch.equal(task.batch(1).tokens, recall_task(seed=1).batch(1).tokens)


def test_samples_are_words() -> None:
    sample = recall_task().sample(small_model())
    assert sample is not None
    assert sample.count("->") == 3
    written = sample_text(small_model(vocab_size=257), b"def ", max_new_tokens=5)
    assert written.startswith("def ")
    text = text_task().sample(small_model(vocab_size=257))
    assert text is not None
    assert all(c.isprintable() or c in "\n\t" for c in text)


def test_what_can_not_be_scored_is_refused() -> None:
    with pytest.raises(ValueError, match=r"vocab_size of x must be 257 for text .*, got 64"):
        check_text_vocabulary(64, "x")
    with pytest.raises(ValueError, match="problems must name at least one"):
        RecallTask([])
    with pytest.raises(ValueError, match="held_out_size must be at least 1, got 0"):
        RecallTask([PROBLEM], held_out_size=0)
    with pytest.raises(ValueError, match="held_out_bytes must be at least 1, got 0"):
        TextTask(CORPUS, held_out_bytes=0)
