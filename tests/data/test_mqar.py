"""The rules of the recall task, as properties of what the generator draws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from linear_moe.data.batch import IGNORE_INDEX, seeded
from linear_moe.data.mqar import MQAR, ZOOLOGY_TEST, ZOOLOGY_TRAIN, mqar_batch


@st.composite
def problems(draw: st.DrawFn) -> MQAR:
    pairs = draw(st.integers(1, 9))
    return MQAR(
        vocab_size=2 * (pairs + 1) + draw(st.integers(0, 40)),
        length=4 * pairs + 2 * draw(st.integers(0, 20)),
        num_pairs=pairs,
        filler=draw(st.sampled_from(["zero", "uniform"])),
        power=draw(st.sampled_from([0.01, 0.5, 1.0, 2.0])),
    )


@given(problems(), st.integers(0, 2**40))
def test_every_key_is_asked_for_once_and_answered_by_its_value(problem: MQAR, seed: int) -> None:
    tokens, labels, *_ = mqar_batch(problem, 5, seeded(seed))
    assert tokens.shape == labels.shape == (5, problem.length)
    assert tokens.dtype == labels.dtype == torch.int64
    half, prefix = problem.vocab_size // 2, 2 * problem.num_pairs
    for row, answers in zip(tokens, labels, strict=True):
        keys, values = row[:prefix:2].tolist(), row[1:prefix:2].tolist()
        assert len(set(keys)) == len(set(values)) == problem.num_pairs
        assert all(1 <= key < half for key in keys)
        assert all(half <= value < problem.vocab_size for value in values)
        bound = dict(zip(keys, values, strict=True))
        asked = [(int(row[p]), int(answers[p])) for p in range(problem.length) if answers[p] != IGNORE_INDEX]
        assert sorted(asked) == sorted(bound.items())
        places = (answers != IGNORE_INDEX).nonzero().flatten()
        assert int(places.min()) >= prefix
        assert (places % 2 == 0).all()
        if problem.filler == "zero":
            rest = row[prefix:][answers[prefix:] == IGNORE_INDEX]
            assert (rest == 0).all()


def test_the_same_seed_is_the_same_batch_and_another_is_not() -> None:
    problem = MQAR(vocab_size=64, length=32, num_pairs=4, filler="uniform")
    first, again, other = (mqar_batch(problem, 8, seeded(seed, 3)) for seed in (1, 1, 2))
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.tokens, other.tokens)
    assert first.num_labels == 8 * 4


def test_slots_follow_the_power_law() -> None:
    problem = MQAR(vocab_size=64, length=22, num_pairs=1, power=0.01)
    labels = mqar_batch(problem, 20_000, seeded(0)).labels
    slots = ((labels != IGNORE_INDEX).nonzero()[:, 1] - 2) // 2
    share = slots.bincount(minlength=problem.num_slots) / 20_000
    rank = torch.arange(1, problem.num_slots + 1, dtype=torch.float64)
    wanted = rank**-0.99 / (rank**-0.99).sum()
    assert (share - wanted).abs().max() < 4 * (0.25 / 20_000) ** 0.5


def test_the_second_draw_is_from_what_is_left() -> None:
    problem = MQAR(vocab_size=64, length=10, num_pairs=2, power=0.5)
    tokens, labels, *_ = mqar_batch(problem, 40_000, seeded(1))
    second = (tokens == tokens[:, 2:3]) & (labels != IGNORE_INDEX)
    slot = (second.int().argmax(1) - 4) // 2
    p = torch.arange(1, 4, dtype=torch.float64) ** -0.5
    p = p / p.sum()
    wanted = torch.stack([sum(p[i] * p[j] / (1 - p[i]) for i in range(3) if i != j) for j in range(3)])
    assert (slot.bincount(minlength=3) / 40_000 - wanted).abs().max() < 4 * (0.25 / 40_000) ** 0.5


def test_keys_values_and_filler_are_uniform() -> None:
    problem = MQAR(vocab_size=16, length=40, num_pairs=3, filler="uniform")
    tokens, labels, *_ = mqar_batch(problem, 10_000, seeded(2))
    for column, low, high in ((0, 1, 8), (4, 1, 8), (1, 8, 16), (5, 8, 16)):
        share = tokens[:, column].bincount(minlength=16)[low:high] / 10_000
        assert (share - 1 / (high - low)).abs().max() < 4 * (0.25 / 10_000) ** 0.5
    filler = tokens[:, 6:][labels[:, 6:] == IGNORE_INDEX]
    assert (filler.bincount(minlength=16) / filler.numel() - 1 / 16).abs().max() < 0.005


def test_the_published_sets_are_possible_problems() -> None:
    for length, pairs, *_ in (*ZOOLOGY_TRAIN, *ZOOLOGY_TEST):
        assert mqar_batch(MQAR(length=length, num_pairs=pairs), 2, seeded(0)).tokens.shape == (2, length)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"num_pairs": 0}, "num_pairs must be at least 1, got 0"),
        ({"length": 15}, "length must be even and at least 4"),
        ({"length": 14}, "at least 4 \\* num_pairs = 16"),
        ({"vocab_size": 9}, "vocab_size must be at least 2 \\* \\(num_pairs \\+ 1\\) = 10"),
        ({"filler": "ones"}, "filler must be one of zero, uniform, got 'ones'"),
        ({"power": 0.0}, "power must be above 0"),
    ],
)
def test_impossible_problems_are_refused(arguments: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        MQAR(**{"num_pairs": 4, **arguments})  # type: ignore[arg-type]


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        mqar_batch(MQAR(), 0, seeded(0))
