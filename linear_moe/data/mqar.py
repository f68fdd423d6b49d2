"""Multi-query associative recall (Arora et al., "Zoology", 2312.04927, section 4 and its published generator).

    k1 v1 k2 v2 ... kN vN | _ k2 _ _ _ k1 ...
                               ^ v2      ^ v1   are the labels there

The prefix of 2N tokens binds N keys to N values; each key is asked for once, in one of the (L - 2N) / 2 even slots after it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linear_moe.data.batch import IGNORE_INDEX, Batch

FILLERS = ("zero", "uniform")


@dataclass(frozen=True)
class MQAR:
    """The sizes of one recall problem.

    Args:
        vocab_size: keys are drawn from [1, vocab_size // 2), values from [vocab_size // 2, vocab_size).
        length: L, tokens of a sequence, even.
        num_pairs: N, at most L / 4.
        filler: what stands between the queries: "zero" (token 0), or "uniform" over the vocabulary.
        power: a; a query's slot i = 1, 2, ... has probability proportional to a i^(a - 1): the published 0.01 asks mostly
            soon after the prefix, and 1 anywhere alike.

    Raises:
        ValueError: naming the argument that does not fit.
    """

    vocab_size: int = 8192
    length: int = 64
    num_pairs: int = 4
    filler: str = "zero"
    power: float = 0.01

    def __post_init__(self) -> None:
        if self.num_pairs < 1:
            raise ValueError(f"num_pairs must be at least 1, got {self.num_pairs}")
        if self.length % 2 or self.length < 4 * self.num_pairs:
            raise ValueError(
                f"length must be even and at least 4 * num_pairs = {4 * self.num_pairs}, so that every key finds a slot; "
                f"got {self.length}"
            )
        if self.vocab_size // 2 - 1 < self.num_pairs:
            raise ValueError(
                f"vocab_size must be at least 2 * (num_pairs + 1) = {2 * (self.num_pairs + 1)}, for that many different "
                f"keys; got {self.vocab_size}"
            )
        if self.filler not in FILLERS:
            raise ValueError(f"filler must be one of {', '.join(FILLERS)}, got {self.filler!r}")
        if not self.power > 0:
            raise ValueError(f"power must be above 0, got {self.power}")

    @property
    def num_slots(self) -> int:
        """Slots a query may stand in."""
        return (self.length - 2 * self.num_pairs) // 2


ZOOLOGY_TRAIN = ((64, 4, 100_000), (128, 8, 20_000), (256, 16, 20_000), (256, 32, 20_000), (256, 64, 20_000))
"""The published training mix: length, pairs, examples. Vocabulary 8192."""
ZOOLOGY_TEST = ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))
"""The published test sets of 1000 examples each: length, pairs."""


def mqar_batch(problem: MQAR, batch_size: int, generator: torch.Generator) -> Batch:
    """Draw sequences of a problem.

    Args:
        problem: the sizes.
        batch_size: B.
        generator: on the CPU; the same state gives the same batch on any machine.

    Returns:
        `tokens` and `labels` `[B, length]` int64. A label is at the position of its query, `IGNORE_INDEX` everywhere else.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    pairs, half = problem.num_pairs, problem.vocab_size // 2
    keys = 1 + _distinct(batch_size, half - 1, pairs, generator)
    values = half + _distinct(batch_size, problem.vocab_size - half, pairs, generator)
    rank = torch.arange(1, problem.num_slots + 1, dtype=torch.float64)
    slots = _distinct(batch_size, problem.num_slots, pairs, generator, (problem.power - 1) * rank.log())
    positions = 2 * pairs + 2 * slots

    shape = (batch_size, problem.length)
    if problem.filler == "uniform":
        tokens = torch.randint(problem.vocab_size, shape, generator=generator)
    else:
        tokens = torch.zeros(shape, dtype=torch.int64)
    tokens[:, : 2 * pairs] = torch.stack((keys, values), -1).flatten(1)
    tokens.scatter_(1, positions, keys)
    labels = torch.full(shape, IGNORE_INDEX).scatter_(1, positions, values)
    return Batch(tokens, labels)


def _distinct(
    rows: int, choices: int, count: int, generator: torch.Generator, log_weight: Tensor | None = None
) -> Tensor:
    """`[rows, count]` of `choices` without replacement, in the order drawn, each draw proportional to the weights left.

    The largest `count` of log weight + Gumbel noise, in descending order, are exactly such draws.
    """
    uniform = torch.rand(rows, choices, dtype=torch.float64, generator=generator)
    # Without weights the order of the noise does, whatever its distribution.
    score = uniform if log_weight is None else log_weight - (-uniform.clamp_min(1e-300).log()).log()
    return score.topk(count, dim=-1).indices
