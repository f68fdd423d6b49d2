"""A needle in a haystack: found by whoever can see it, where it was said to stand, and by nobody else."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import small_model
from torch import Tensor, nn

from linear_moe.data.text import DOCUMENT_START
from linear_moe.data.vocabulary import ByteVocabulary
from linear_moe.evaluation import Sizes, needle_in_a_haystack
from linear_moe.evaluation.needle import NUM_DIGITS, PLACES, make_trial

BYTES = ByteVocabulary()
HAYSTACK = [b"".join(b"line %d of a text that is about nothing much\n" % (i * i) for i in range(60))]
TOKENS = BYTES.document(HAYSTACK[0])[1:]


@dataclass
class Seen:
    """The texts so far."""

    texts: list[list[int]]
    tokens_seen: Tensor = field(default_factory=lambda: torch.zeros(1))

    @property
    def batch_size(self) -> int:
        return len(self.texts)

    def clone(self) -> Seen:
        return Seen([list(text) for text in self.texts])

    def compact(self) -> Seen:
        return self


class Finder(nn.Module):
    """Expects after the last `window` tokens what came after their longest end the last time; seen as a LanguageModel."""

    def __init__(self, window: int = 10**6) -> None:
        super().__init__()
        self.window = window
        self.anything = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(vocab_size=257, name="finder")
        self.blocks: list[Any] = []

    def new_state(self, batch_size: int) -> Seen:
        return Seen([[] for _ in range(batch_size)])

    def _check_tokens(self, tokens: Tensor, padding_mask: None) -> None:
        assert padding_mask is None

    def hidden(self, tokens: Tensor, *, state: Seen, padding_mask: None = None) -> Tensor:
        logits = torch.zeros(*tokens.shape, 257)
        for row, text in enumerate(state.texts):
            for column, token in enumerate(tokens[row].tolist()):
                text.append(token)
                expected = self.expected(bytes(t % 256 for t in text[-self.window :]))
                if expected is not None:
                    logits[row, column, expected] = 9
        return logits

    @staticmethod
    def expected(text: bytes) -> int | None:
        for length in range(min(40, len(text) - 1), 8, -1):
            place = text.rfind(text[-length:], 0, len(text) - 1)
            if place >= 0:
                return text[place + length]
        return None

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


def found(window: int, **options: Any) -> dict[tuple[int, float], tuple[float, float]]:
    model: Any = Finder(window)
    result = needle_in_a_haystack(model, HAYSTACK, BYTES, num_trials=3, **options)
    return {(row["length"], row["depth"]): (row["exact"], row["first"]) for row in result.rows}


@pytest.mark.parametrize("sizes", [Sizes(), Sizes(segment=50, batch_tokens=1)])
def test_who_sees_the_needle_finds_it(sizes: Sizes) -> None:
    assert set(found(10**6, lengths=(200, 300), depths=(0, 0.5, 1), sizes=sizes).values()) == {(1.0, 1.0)}


def test_who_sees_the_end_finds_the_needles_at_the_end() -> None:
    scores = found(250, lengths=(230, 600), depths=(0.0, 0.9))
    assert scores[230, 0.0] == scores[230, 0.9] == scores[600, 0.9] == (1.0, 1.0)
    # Beyond what it sees it has no say: nothing is written, and ties are no find.
    assert scores[600, 0.0] == (0.0, 0.0)


def test_a_trial_is_what_it_says() -> None:
    text = b"".join(HAYSTACK)
    depths = {}
    for depth in (0.0, 0.3, 1.0):
        trial = make_trial(TOKENS, BYTES, 700, depth, seed=1, index=2)
        assert len(trial.tokens) == 700 and trial.tokens[0] == 256
        body, numbers = bytes(trial.tokens[1:]), [bytes(candidate).decode() for candidate in trial.candidates]
        needle = f"number of {next(p for p in PLACES if p.encode() in body)} is{numbers[0]}.\n".encode()
        assert body.count(b"secret") == 2 and body.count(needle) == 1
        assert body.endswith(b" is")
        depths[depth] = body.index(b"\nThe secret")
        # It stands between two lines, and the haystack around it is whole.
        assert depth == 0 or body[depths[depth] - 1 : depths[depth]] == b"\n"
        begin, end = depths[depth], body.index(needle) + len(needle)
        question = body.rindex(b"\nThe secret")
        assert body[:begin] + body[end:question] in text
        assert len(set(numbers)) == 10
        assert all(re.fullmatch(rf" \d{{{NUM_DIGITS}}}", number) for number in numbers)
    assert depths[0.0] == 0 and 150 < depths[0.3] <= 200 and 590 < depths[1.0] <= 640
    first, again, other = (make_trial(TOKENS, BYTES, 700, 0.3, 1, index) for index in (2, 2, 3))
    assert first == again
    assert first.candidates[0] != other.candidates[0]


class SomePairs(ByteVocabulary):
    """ASCII, in which every pair of digits that is an even number is one token: numbers of two to four tokens."""

    def document(self, content: bytes) -> Tensor:
        parts = re.findall(rb"\d[02468]|.", content, re.DOTALL)
        tokens = [128 + int(part) if len(part) == 2 else part[0] for part in parts]
        return torch.tensor([DOCUMENT_START, *tokens])


@pytest.mark.parametrize("vocabulary", [BYTES, SomePairs()], ids=["bytes", "pairs"])
def test_the_scores_are_those_of_a_full_pass(vocabulary: ByteVocabulary) -> None:
    """Of a model with states: the session's pieces and paddings against one pass over text and candidate."""
    model = small_model().double()
    rows = needle_in_a_haystack(model, HAYSTACK, vocabulary, lengths=[150], depths=[0.5], num_trials=4, seed=4).rows
    haystack, ranks, exact, widths = vocabulary.document(HAYSTACK[0])[1:], [], [], set()
    with torch.no_grad():
        for index in range(4):
            trial = make_trial(haystack, vocabulary, 150, 0.5, 4, index)
            scores = []
            for candidate in trial.candidates:
                tokens = torch.tensor([trial.tokens + candidate])
                logs = model(tokens[:, :-1])[0, -len(candidate) :].log_softmax(-1)
                scores.append(float(logs.gather(-1, torch.tensor(candidate)[:, None]).sum()))
                widths.add(len(candidate))
            ranks.append(1 + sum(score >= scores[0] for score in scores[1:]))
            written = model.generate(torch.tensor([trial.tokens]), max_new_tokens=len(trial.candidates[0]))
            exact.append(written[0, 150:].tolist() == trial.candidates[0])
    assert len(widths) == 1 if vocabulary is BYTES else len(widths) > 1
    assert rows[0]["mean_rank"] == pytest.approx(sum(ranks) / 4)
    assert rows[0]["first"] == ranks.count(1) / 4
    assert rows[0]["exact"] == sum(exact) / 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": [50]}, r"lengths must be at least \d+ for the needle and its question, got 50"),
        ({"lengths": [200, 99_999]}, r"lengths must be at most [\d,]+ on this text, got 99,999"),
        ({"lengths": []}, "lengths must name at least one, got none"),
        ({"depths": [0.5, 1.5]}, "depths must be between 0 and 1, got 1.5"),
        ({"num_trials": 0}, "num_trials must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        needle_in_a_haystack(small_model(), HAYSTACK, BYTES, **options)
