"""A needle in a haystack: one sentence somewhere in a long text, asked for at its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from linear_moe.data.batch import seeded
from linear_moe.data.text import DOCUMENT_START
from linear_moe.evaluation.result import Column, Result, Track, untracked
from linear_moe.evaluation.segments import Sizes
from linear_moe.models.model import LanguageModel
from linear_moe.models.session import Session, evaluating
from linear_moe.training.tasks import check_text_vocabulary

NUM_DIGITS = 4
NUM_DISTRACTORS = 9
PLACES = ("Ankara", "Bergen", "Cusco", "Dakar", "Fargo", "Genoa", "Hanoi", "Izmir", "Jaipur", "Kyoto", "Lagos", "Malmo")
NEEDLE = "\nThe secret number of {place} is {number}.\n"
QUESTION = "\nThe secret number of {place} is "

COLUMNS = (
    Column("length", "bytes", ","),
    Column("depth", "depth", ".0%"),
    Column("trials", "trials", ","),
    Column("exact", "written exactly", ".3f"),
    Column("first", "ranked first", ".3f"),
    Column("mean_rank", "mean rank", ".2f"),
)


class Trial(NamedTuple):
    """One haystack with its needle."""

    tokens: list[int]
    """Document start, haystack, needle, haystack, question."""
    answer: str
    candidates: list[str]
    """The answer first, then the distractors."""


def needle_in_a_haystack(
    model: LanguageModel,
    documents: Sequence[bytes],
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
        model: of bytes.
        documents: what haystacks are cut from.
        lengths: tokens of a text, question included.
        depths: where the needle stands: 0 at the start of the haystack, 1 at its end. It goes to the nearest line end before.
        num_trials: texts of each length and depth.
        seed: of numbers, places and haystacks; a trial's are the same at every depth.
        sizes: how much is done at once.
        track: told how far it is.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    check_text_vocabulary(model.config.vocab_size, model.config.name or "the model")
    for name, values in (("lengths", lengths), ("depths", depths)):
        if not values:
            raise ValueError(f"{name} must name at least one, got none")
    for depth in depths:
        if not 0 <= depth <= 1:
            raise ValueError(f"depths must be between 0 and 1, got {depth}")
    if num_trials < 1:
        raise ValueError(f"num_trials must be at least 1, got {num_trials}")
    sizes = sizes or Sizes()
    haystack = b"\n".join(documents)
    # Before the first is run: a length that can't be is no news for after an hour.
    for length in lengths:
        make_trial(haystack, length, 0, seed, 0)
    total, done = num_trials * len(depths) * sum(lengths), 0
    rows: list[dict[str, Any]] = []
    for length in lengths:
        for depth in depths:
            exact, ranks = 0, []
            for start, stop in sizes.batches(num_trials, length):
                trials = [make_trial(haystack, length, depth, seed, index) for index in range(start, stop)]
                written, places = _asked(model, trials, sizes.segment)
                exact += sum(text == trial.answer for text, trial in zip(written, trials, strict=True))
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


def make_trial(haystack: bytes, length: int, depth: float, seed: int, index: int) -> Trial:
    """One text of `length` tokens: its place, numbers and haystack depend on `seed`, `length` and `index` alone.

    Raises:
        ValueError: if the needle and its question don't fit, or the haystack is too short.
    """
    generator = seeded(seed, length, index)
    place = PLACES[int(torch.randint(len(PLACES), (), generator=generator))]
    base = 10 ** (NUM_DIGITS - 1)
    numbers = [str(base + int(n)) for n in torch.randperm(9 * base, generator=generator)[: NUM_DISTRACTORS + 1]]
    needle = NEEDLE.format(place=place, number=numbers[0]).encode()
    question = QUESTION.format(place=place).encode()
    room = length - 1 - len(needle) - len(question)
    if room < 0:
        raise ValueError(f"lengths must be at least {length - room} for the needle and its question, got {length}")
    if room > len(haystack):
        raise ValueError(f"lengths must be at most {len(haystack) + length - room:,} on this text, got {length:,}")
    begin = int(torch.randint(len(haystack) - room + 1, (), generator=generator))
    straw = haystack[begin : begin + room]
    at = round(depth * room)
    line_end = straw.rfind(b"\n", 0, at) + 1
    # A text of one line has no better place than the one that was asked for.
    at = line_end if line_end or at == 0 else at
    tokens = [DOCUMENT_START, *straw[:at], *needle, *straw[at:], *question]
    return Trial(tokens, numbers[0], numbers)


@torch.no_grad()
def _asked(model: LanguageModel, trials: Sequence[Trial], segment: int) -> tuple[list[str], list[int]]:
    """What the model writes in each trial, and the rank of the right number, from 1."""
    device = next(model.parameters()).device
    session = Session(model, len(trials))
    session.read(torch.tensor([trial.tokens for trial in trials], device=device), segment=segment)
    scores = []
    for candidate in range(NUM_DISTRACTORS + 1):
        digits = torch.tensor([list(trial.candidates[candidate].encode()) for trial in trials], device=device)
        scores.append(_log_likelihood(model, session, digits))
    score = torch.stack(scores, 1)
    # Ties (and NaN) count against it: a model that says the same of all of them knows nothing.
    ranks = (~(score[:, 1:] < score[:, :1])).sum(1) + 1
    written = torch.stack(list(session.write(NUM_DIGITS)), 1).tolist()
    return [bytes(t for t in row if t < DOCUMENT_START).decode("latin-1") for row in written], ranks.tolist()


def _log_likelihood(model: LanguageModel, session: Session, tokens: Tensor) -> Tensor:
    """`[B]` of `tokens` `[B, n]` as what comes next; the session stays where it is."""
    state = session.state.clone()
    with evaluating(model):
        later = model.logits(model.hidden(tokens[:, :-1], state=state))
    logits = torch.cat((session.logits()[:, None], later), 1).double()
    return logits.log_softmax(-1).gather(-1, tokens[..., None]).sum((1, 2))
