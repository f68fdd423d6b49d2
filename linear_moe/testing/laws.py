"""What a law is, the case it is tried on, and how it is reported broken."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from linear_moe.rules.base import RuleDims, UpdateRule

EXACT = 1e-10
"""How far two float64 results that differ in the order of their sums may be apart, against max(1, largest number)."""


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The CPU's global generator, from a seed on; afterwards it is as it was. No other device's is touched.

    `torch.manual_seed` without a GPU keeps a traceback for each kind of device, at every call: milliseconds, in a test.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@dataclass(frozen=True, repr=False)
class Case:
    """One input of a law: small, made again from its numbers alone, and printed as the call that makes it."""

    rule: type[UpdateRule]
    options: Mapping[str, Any] = field(default_factory=dict)
    """The rule's options."""
    lengths: tuple[int, ...] = (3,)
    """Tokens of each sequence."""
    num_heads: int = 1
    """Key heads."""
    num_value_heads: int = 1
    """A multiple of the key heads."""
    head_dim: int = 2
    head_value_dim: int = 2
    tokens: str = "rule"
    """Where the recurrence's tensors come from: see `TOKEN_KINDS`."""
    hidden_size: int = 4
    """D, for a law of layers, as are the next four."""
    num_memories: int = 2
    top_k: int = 1
    shared_memory: bool = True
    layer_options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the layer."""
    seed: int = 0
    """Of every number drawn."""

    def __repr__(self) -> str:
        """The call that makes it, defaults left out."""
        default = Case(self.rule)
        shown = [self.rule.__name__]
        for each in fields(self)[1:]:
            value = getattr(self, each.name)
            if value != getattr(default, each.name):
                shown.append(f"{each.name}={value!r}")
        return f"Case({', '.join(shown)})"

    @property
    def dims(self) -> RuleDims:
        """The sizes the rule is built with."""
        return RuleDims(
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            num_value_heads=self.num_value_heads,
            head_dim=self.head_dim,
            head_value_dim=self.head_value_dim,
        )

    def build(self) -> UpdateRule:
        """The rule of this case.

        Raises:
            ValueError: if the rule refuses these sizes or options.
        """
        return self.rule(self.dims, **self.options)

    def randn(self, *shape: int, stream: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
        """Normal numbers, the same for the same shape and `stream`, in float64 before they are rounded to `dtype`."""
        generator = torch.Generator().manual_seed(1000 * self.seed + stream)
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    @property
    def cu_seqlens(self) -> Tensor:
        """`[N + 1]` borders of the sequences packed one after another."""
        return torch.tensor([0, *self.lengths]).cumsum(0)


TOKEN_KINDS = ("rule", "drawn", "extreme")
"""rule: made by the rule from random projections, as in a layer. drawn: its gates and keys replaced by ones from their whole
range: decays from 1 to 1e-6 a token, keys of norm 1, beta in [0, 2]. extreme: by the ends of that range: decays 1 and 1e-6,
nearly parallel keys, beta 0, 1 and 2."""


class Violation(AssertionError):  # noqa: N818
    """Raised by a law's check: in words, what was expected and what was measured."""


class LawBroken(AssertionError):  # noqa: N818
    """A rule, or its implementation, breaks a law.

    Attributes:
        law: the law's name.
        statement: the law in words.
        case: the input, the smallest found.
        measured: what was expected there and what came.
    """

    def __init__(self, law: str, statement: str, case: Case, measured: str) -> None:
        super().__init__(law, statement, case, measured)
        self.law, self.statement, self.case, self.measured = law, statement, case, measured

    def __str__(self) -> str:
        rule = self.case.rule
        return (
            f"{rule.name or rule.__name__} breaks the law {self.law!r}: {self.statement}\n"
            f"  on: {self.case}\n"
            f"  measured: {self.measured}"
        )


@dataclass(frozen=True)
class Sizes:
    """From which sizes the cases of a law are drawn: each a range, both ends included."""

    tokens: tuple[int, int] = (0, 140)
    """In all sequences together."""
    num_heads: tuple[int, int] = (1, 3)
    head_dim: tuple[int, int] = (1, 6)
    """Of keys and of values."""
    kinds: tuple[str, ...] = TOKEN_KINDS


ORDINARY_SIZES = Sizes()
"""Of a law that says nothing else."""


@dataclass(frozen=True)
class Law:
    """A sentence that holds for every case, and the code that tries it on one."""

    name: str
    statement: str
    check: Callable[[Case], None]
    """Raises `Violation` if the law does not hold; any other error of the code under test breaks the law as well."""
    applies: Callable[[type[UpdateRule]], bool] = lambda rule: True
    """Whether the law speaks of this rule."""
    sizes: Sizes = ORDINARY_SIZES
    max_examples: int | None = None
    """A slow law is tried on no more inputs than these."""

    def __call__(self, case: Case) -> None:
        """Try the law on a case.

        Raises:
            LawBroken: if it does not hold.
        """
        try:
            self.check(case)
        except Violation as violation:
            raise LawBroken(self.name, self.statement, case, str(violation)) from violation
        except Exception as error:
            raise LawBroken(self.name, self.statement, case, f"{type(error).__name__}: {error}") from error


def require(condition: bool, measured: str) -> None:
    """Raise `Violation` with what was measured unless `condition`."""
    if not condition:
        raise Violation(measured)


def require_close(name: str, got: Tensor, expected: Tensor, tolerance: float = EXACT) -> None:
    """Equal shapes, and every number within `tolerance` * max(1, largest expected number)."""
    require(got.shape == expected.shape, f"{name} has shape {list(got.shape)}, expected {list(expected.shape)}")
    if not expected.numel():
        return
    difference = (got.detach().double() - expected.detach().double()).abs()
    # NaN against NaN too: nothing here should make one.
    difference = torch.where(difference.isnan(), torch.inf, difference)
    allowed = tolerance * max(1.0, float(expected.detach().abs().max()))
    worst = int(difference.argmax())
    at = [int(i) for i in torch.unravel_index(torch.tensor(worst), difference.shape)]
    require(
        float(difference.max()) <= allowed,
        f"{name}{at} is {float(got.detach().flatten()[worst]):.6g}, expected {float(expected.detach().flatten()[worst]):.6g} "
        f"(apart by {float(difference.max()):.3g}, allowed {allowed:.3g})",
    )


def require_all_close(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = EXACT) -> None:
    """`require_close` of tensors by name."""
    require(got.keys() == expected.keys(), f"there are {sorted(got)}, expected {sorted(expected)}")
    for name, tensor in got.items():
        require_close(name, tensor, expected[name], tolerance)


def require_same_bits(name: str, got: Tensor, expected: Tensor) -> None:
    """Bit for bit the same."""
    require(got.dtype == expected.dtype, f"{name} is {got.dtype}, expected {expected.dtype}")
    require_close(name, got, expected, tolerance=0.0)


def require_zero(name: str, got: Tensor | None) -> None:
    """Exactly 0 everywhere; None (a gradient nothing flowed into) is 0."""
    if got is not None:
        require_close(name, got, torch.zeros_like(got), tolerance=0.0)


def require_finite(name: str, got: Tensor) -> None:
    """No NaN and no infinity."""
    bad = int((~got.isfinite()).sum())
    require(bad == 0, f"{name} has {bad} of {got.numel()} numbers that are not finite")
