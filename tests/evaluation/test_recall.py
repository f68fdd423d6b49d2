"""Recall by size: training's own score on the same problems, read in segments."""

from __future__ import annotations

import pytest
from checkpoints import small_model

from linear_moe.data.mqar import MQAR, ZOOLOGY_TEST
from linear_moe.evaluation import Sizes, published_problems, recall_by_size
from linear_moe.evaluation.recall import problem_of
from linear_moe.training.tasks import RecallTask


@pytest.mark.parametrize("segment", [9, 2048])
def test_it_is_the_score_of_training(segment: int) -> None:
    model = small_model(16).double()
    problems = [MQAR(16, 16, 3), MQAR(16, 64, 6), MQAR(12, 24, 4)]
    # More than a batch of them.
    result = recall_by_size(model, problems, num_examples=150, sizes=Sizes(segment=segment))
    wanted = RecallTask(problems, held_out_size=150).evaluate(model)
    for row, problem in zip(result.rows, problems, strict=True):
        assert row["accuracy"] == wanted[f"accuracy {problem.length}/{problem.num_pairs}"]
        assert row["asked"] == 150 * problem.num_pairs
    assert 0 < result.rows[0]["accuracy"] < 1
    assert [row["chance"] for row in result.rows] == [1 / 8, 1 / 8, 1 / 6]


def test_published_problems_are_those_that_fit() -> None:
    assert [(p.length, p.num_pairs) for p in published_problems(8192)] == list(ZOOLOGY_TEST)
    assert [(p.length, p.num_pairs) for p in published_problems(64)] == [(64, 4), (64, 8), (64, 16)]
    with pytest.raises(ValueError, match="no published recall problem fits vocab_size = 8"):
        published_problems(8)


def test_bad_arguments_are_named() -> None:
    model = small_model(16)
    assert problem_of("16:3", 16) == MQAR(16, 16, 3)
    for text in ("16", "a:b", "16:-1", ""):
        with pytest.raises(ValueError, match="a problem is LENGTH:PAIRS"):
            problem_of(text, 16)
    with pytest.raises(ValueError, match="problems need a vocabulary of 99, the model has 16 tokens"):
        recall_by_size(model, [MQAR(99, 16, 3)])
    with pytest.raises(ValueError, match="must name at least one kind of problem"):
        recall_by_size(model, [])
    with pytest.raises(ValueError, match="num_examples must be at least 1, got 0"):
        recall_by_size(model, [MQAR(16, 16, 3)], num_examples=0)
