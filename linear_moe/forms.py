"""The declared form of a linear recurrence: what a rule says of itself and what an implementation is chosen by.

Every form is a point of

    S' = Diag(a_t) S_{t-1}                          a_t by `Decay`
    S_t = S' + w_t (v_t - erased)                   `erased` by `Erase`
    o_t = scale * q_t^T S_t

This module is a leaf: kernels and rules both import it, and it imports neither.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple


class Decay(enum.Enum):
    """How the state fades before each write. Decays are passed as natural logarithms, at most 0."""

    NONE = "none"
    """a_t = 1."""
    HEAD = "head"
    """One constant a head: `log_decay` is `[H]`."""
    SCALAR = "scalar"
    """One number a token and head: `log_decay` is `[B, T, H]`."""
    VECTOR = "vector"
    """One number a token, head and key channel: `log_decay` is `[B, T, H, K]`."""


class Erase(enum.Enum):
    """What a write removes from the decayed state S' before it adds."""

    NONE = "none"
    """S_t = S' + k_t v_t^T."""
    DELTA = "delta"
    """S_t = S' + beta_t k_t (v_t - S'^T k_t)^T, with `beta` `[B, T, H]`."""


@dataclass(frozen=True)
class Recurrence:
    """The form of a rule: its decay and its erase. Selects and specialises an implementation."""

    decay: Decay = Decay.NONE
    erase: Erase = Erase.NONE

    def __str__(self) -> str:
        return f"{self.decay.value} decay, {self.erase.value} erase"


class SoftplusDecay(NamedTuple):
    """A scalar decay, log_decay = -exp(rate) softplus(x + shift): of a head's rate for a time that the token chooses."""

    projection: str
    """x, a number a value head."""
    rate: str
    """The parameter `[H]`."""
    shift: str
    """The parameter `[H]`."""


class SigmoidStrength(NamedTuple):
    """A delta write's strength, beta = largest * sigmoid(x)."""

    projection: str
    """x, a number a value head."""
    largest: float


class GateForms(NamedTuple):
    """The gates of a rule, where they are of a form that kernels know."""

    log_decay: SoftplusDecay | None = None
    beta: SigmoidStrength | None = None


class GateColumns(NamedTuple):
    """Where in a fused projection the numbers lie that a rule's gates are made of, side by side for its heads."""

    decay: int | None
    """The first column of `SoftplusDecay.projection`, or None without such a gate."""
    strength: int | None
    """The first column of `SigmoidStrength.projection`, or None."""
    heads: int
    """H"""
    largest: float
    """Of the strength."""
