"""The one error budget: how wrong an implementation may be, measured against how wrong the plain one is.

    error(candidate vs float64) <= 2 * (error(reference in the same dtype vs float64) + eps(dtype) * max|float64 result|)

by maximum absolute error, for outputs and every gradient. Nobody picks a tolerance by hand. What is a difference of larger
numbers by its nature, as the gradient of a decay is, has the rounding of those numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Budget:
    """The error of one tensor and what it may be."""

    name: str
    error: float
    """Of the candidate, against float64."""
    reference_error: float
    """Of the reference in the candidate's dtype, against float64."""
    rounding: float
    """eps(dtype) * max|float64 result|, or of the terms it is a difference of"""

    @property
    def allowed(self) -> float:
        """2 * (reference_error + rounding)"""
        return 2 * (self.reference_error + self.rounding)

    @property
    def holds(self) -> bool:
        """Whether the error is within what is allowed. NaN is not."""
        return self.error <= self.allowed

    def __str__(self) -> str:
        return (
            f"{self.name}: error {self.error:.3g}, allowed {self.allowed:.3g} = 2 * "
            f"(reference's error {self.reference_error:.3g} + rounding {self.rounding:.3g})"
        )


def error_budget(
    candidate: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    terms: Mapping[str, Tensor] | None = None,
) -> list[Budget]:
    """The budget of each tensor.

    Args:
        candidate: what is tried, by name: outputs and gradients.
        reference: the plain implementation's, in the same dtype on the same inputs.
        exact: the plain implementation's in float64 on the same (rounded) inputs.
        dtype: whose eps counts; each candidate's own unless given.
        terms: of a tensor that is a difference of larger numbers, those numbers.

    Raises:
        ValueError: if names or shapes disagree, or `exact` is not float64.
    """
    for what, other in (("reference", reference), ("exact", exact)):
        if candidate.keys() != other.keys():
            raise ValueError(f"{what} must have the candidate's tensors, {sorted(candidate)}, got {sorted(other)}")
    budgets = []
    for name, tensor in candidate.items():
        for what, same in (("reference", reference[name]), ("exact", exact[name])):
            if tensor.shape != same.shape:
                raise ValueError(
                    f"{what}[{name!r}] must have the candidate's shape {list(tensor.shape)}, got {list(same.shape)}"
                )
        if exact[name].dtype != torch.float64:
            raise ValueError(f"exact[{name!r}] must be float64, got {exact[name].dtype}")
        largest = max(_largest(exact[name]), _largest((terms or {}).get(name, exact[name])))
        budgets.append(
            Budget(
                name=name,
                error=_largest(tensor.double() - exact[name]),
                reference_error=_largest(reference[name].double() - exact[name]),
                rounding=torch.finfo(dtype or tensor.dtype).eps * largest,
            )
        )
    return budgets


def assert_within_budget(
    candidate: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    terms: Mapping[str, Tensor] | None = None,
) -> None:
    """Raise AssertionError, naming every tensor that is over its budget. Arguments as `error_budget`."""
    over = [budget for budget in error_budget(candidate, reference, exact, dtype, terms) if not budget.holds]
    if over:
        raise AssertionError("over the error budget: " + "; ".join(str(budget) for budget in over))


def decay_gradient_terms(v: Tensor, d_v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """What the gradient of a scalar log decay is a difference of: for each token, <v, dv> from it to its segment's end.

    That is what all later tokens read of what was written since, its own read among it; <q, dq> is the other term.

    Args:
        v: `[S, H, V]`
        d_v: its gradient, float64.
        cu_seqlens: `[N + 1]` borders of the segments; 0 for tokens past the last.

    Returns:
        `[S, H]` float64.
    """
    written = (v.double() * d_v).sum(-1)
    terms = torch.zeros_like(written)
    for begin, end in itertools.pairwise(cu_seqlens.tolist()):
        terms[begin:end] = written[begin:end].flip(0).cumsum(0).flip(0)
    return terms


def _largest(x: Tensor) -> float:
    return float(x.detach().abs().max()) if x.numel() else 0.0
