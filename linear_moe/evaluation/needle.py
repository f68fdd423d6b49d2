"""A needle in a haystack: one sentence somewhere in a long text, asked for at its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from linear_moe.data.batch import seeded
from linear_moe.data.vocabulary import TextVocabulary
from linear_moe.evaluation.result import Column, Result, Track, untracked
from linear_moe.evaluation.segments import Sizes
from linear_moe.models.model import LanguageModel
from linear_moe.models.session import Session, evaluating

NUM_DIGITS = 4
NUM_DISTRACTORS = 9
PLACES = ("Ankara", "Bergen", "Cusco", "Dakar", "Fargo", "Genoa", "Hanoi", "Izmir", "Jaipur", "Kyoto", "Lagos", "Malmo")
NEEDLE = "\nThe secret number of {place} is {number}.\n"
QUESTION = "\nThe secret number of {place} is"

COLUMNS = (
    Column("length", "length", ","),
    Column("depth", "depth", ".0%"),
    Column("trials", "trials", ","),
    Column("exact", "written exactly", ".3f"),
    Column("first", "ranked first", ".3f"),
    Column("mean_rank", "mean rank", ".2f"),
)


class Trial(NamedTuple):
    """One haystack with its needle."""

    tokens: list[int]
    """The start, haystack, needle, haystack, question."""
    candidates: list[list[int]]
    """The answer first, then the distractors."""


def needle_in_a_haystack(
    model: LanguageModel,
    documents: Sequence[bytes],
    vocabulary: TextVocabulary,
    *,
    lengths: Sequence[int] = (512, 1024, 2048, 4096),
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    num_trials: int = 8,
    seed: int = 0,
    sizes: Sizes | None = None,
    track: Track = untracked,
) -> Result:
    """How well a number that was told once is found again, by the length of the text and where in it the number stands.

    Two scores: whether the likeliest continuation is the number, digit for digit; and the number's rank by log-likelihood
    among itself and distractors that are drawn like it.

    Args:
        model: of text.
        documents: what haystacks are cut from.
        vocabulary: of the model.
        lengths: tokens of a text, question included.
        depths: where the needle stands: 0 at the start of the haystack, 1 at its end. It goes to the nearest line end before.
        num_trials: texts of each length and depth.
        seed: of numbers, places and haystacks; a trial's are the same at every depth.
        sizes: how much is done at once.
        track: told how far it is.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    for name, values in (("lengths", lengths), ("depths", depths)):
        if not values:
            raise ValueError(f"{name} must name at least one, got none")
    for depth in depths:
        if not 0 <= depth <= 1:
            raise ValueError(f"depths must be between 0 and 1, got {depth}")
    if num_trials < 1:
        raise ValueError(f"num_trials must be at least 1, got {num_trials}")
    sizes = sizes or Sizes()
    haystack = vocabulary.document(b"\n".join(documents))[1:]
    # Before the first is run: a length that can't be is no news for after an hour.
    for length in lengths:
        make_trial(haystack, vocabulary, length, 0, seed, 0)
    total, done = num_trials * len(depths) * sum(lengths), 0
    rows: list[dict[str, Any]] = []
    for length in lengths:
        for depth in depths:
            exact, ranks = 0, []
            for start, stop in sizes.batches(num_trials, length):
                trials = [make_trial(haystack, vocabulary, length, depth, seed, index) for index in range(start, stop)]
                found, places = _asked(model, trials, sizes.segment)
                exact += found
                ranks += places
                done += length * len(trials)
                track(done, total)
            rows.append(
                {
                    "length": length,
                    "depth": depth,
                    "trials": num_trials,
                    "exact": exact / num_trials,
                    "first": sum(rank == 1 for rank in ranks) / num_trials,
                    "mean_rank": sum(ranks) / num_trials,
                }
            )
    candidates = NUM_DISTRACTORS + 1
    remark = (
        f"Rank 1 is best of {candidates}; a guess is ranked first {1 / candidates:.3f} of the time, at a mean rank of "
        f"{(candidates + 1) / 2:.1f}, and writes the number {10.0**-NUM_DIGITS:g} of the time."
    )
    return Result("needle", "needle in a haystack", COLUMNS, rows, (remark,))


def make_trial(haystack: Tensor, vocabulary: TextVocabulary, length: int, depth: float, seed: int, index: int) -> Trial:
    """One text of `length` tokens: its place, numbers and haystack depend on `seed`, `length` and `index` alone.

    Raises:
        ValueError: if the needle and its question don't fit, or the haystack is too short.
    """
    generator = seeded(seed, length, index)
    place = PLACES[int(torch.randint(len(PLACES), (), generator=generator))]
    base = 10 ** (NUM_DIGITS - 1)
    numbers = [str(base + int(n)) for n in torch.randperm(9 * base, generator=generator)[: NUM_DISTRACTORS + 1]]
    needle = vocabulary.encode(NEEDLE.format(place=place, number=numbers[0]))
    question = vocabulary.encode(QUESTION.format(place=place))
    room = length - len(vocabulary.start) - len(needle) - len(question)
    if room < 0:
        raise ValueError(f"lengths must be at least {length - room} for the needle and its question, got {length}")
    if room > len(haystack):
        raise ValueError(f"lengths must be at most {len(haystack) + length - room:,} on this text, got {length:,}")
    begin = int(torch.randint(len(haystack) - room + 1, (), generator=generator))
    straw = haystack[begin : begin + room].tolist()
    at = round(depth * room)
    line_end = vocabulary.encode("\n")[-1]
    # A text of one line has no better place than the one that was asked for.
    at = next((place for place in range(at, 0, -1) if straw[place - 1] == line_end), at)
    tokens = [*vocabulary.start, *straw[:at], *needle, *straw[at:], *question]
    # The blank is the answer's: in most vocabularies a word's token begins with it.
    return Trial(tokens, [vocabulary.encode(f" {number}") for number in numbers])


@torch.no_grad()
def _asked(model: LanguageModel, trials: Sequence[Trial], segment: int) -> tuple[int, list[int]]:
    """In how many trials the model writes the right number, and the number's rank in each, from 1."""
    device = next(model.parameters()).device
    session = Session(model, len(trials))
    session.read(torch.tensor([trial.tokens for trial in trials], device=device), segment=segment)
    scores = [
        _log_likelihood(model, session, [trial.candidates[candidate] for trial in trials])
        for candidate in range(NUM_DISTRACTORS + 1)
    ]
    score = torch.stack(scores, 1)
    # Ties (and NaN) count against it: a model that says the same of all of them knows nothing.
    ranks = (~(score[:, 1:] < score[:, :1])).sum(1) + 1
    answers = [trial.candidates[0] for trial in trials]
    written = torch.stack(list(session.write(max(map(len, answers)))), 1).tolist()
    exact = sum(row[: len(answer)] == answer for row, answer in zip(written, answers, strict=True))
    return exact, ranks.tolist()


def _log_likelihood(model: LanguageModel, session: Session, texts: list[list[int]]) -> Tensor:
    """`[B]` of each text as what comes next; the session stays where it is."""
    device, width = session.logits().device, max(map(len, texts))
    tokens = torch.tensor([text + [0] * (width - len(text)) for text in texts], device=device)
    real = torch.tensor([[True] * len(text) + [False] * (width - len(text)) for text in texts], device=device)
    logits = session.logits()[:, None]
    if width > 1:
        with evaluating(model):
            mask = None if bool(real.all()) else real[:, :-1]
            later = model.hidden(tokens[:, :-1], padding_mask=mask, state=session.state.clone())
        logits = torch.cat((logits, model.logits(later)), 1)
    each = logits.double().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    return torch.where(real, each, 0).sum(1)
