"""The error budget of DESIGN: twice the reference's error and a rounding, by maximum absolute error."""

from __future__ import annotations

import pytest
import torch

from linear_moe.testing import assert_within_budget, error_budget

EXACT = {"output": torch.tensor([1.0, -4.0], dtype=torch.float64)}
REFERENCE = {"output": torch.tensor([1.0, -4.001])}
EPS = torch.finfo(torch.float32).eps


def test_the_formula() -> None:
    (budget,) = error_budget({"output": torch.tensor([1.0005, -4.0])}, REFERENCE, EXACT)
    assert budget.name == "output"
    assert budget.error == pytest.approx(5e-4, rel=1e-3)
    assert budget.reference_error == pytest.approx(1e-3, rel=1e-3)
    assert budget.rounding == 4 * EPS
    assert budget.allowed == 2 * (budget.reference_error + budget.rounding)
    assert budget.holds


def test_twice_the_references_error_is_allowed_and_not_more() -> None:
    exact = {"x": torch.zeros(1, dtype=torch.float64)}
    assert_within_budget({"x": torch.tensor([2.0])}, {"x": torch.tensor([1.0])}, exact)
    with pytest.raises(AssertionError, match=r"over the error budget: x: error 2\.01, allowed 2 = 2 \* \(reference's"):
        assert_within_budget({"x": torch.tensor([2.01])}, {"x": torch.tensor([1.0])}, exact)


def test_a_perfect_reference_leaves_two_roundings() -> None:
    exact = {"x": torch.tensor([8.0, 1.0], dtype=torch.float64)}
    reference = {"x": exact["x"].bfloat16()}
    eps = torch.finfo(torch.bfloat16).eps
    assert_within_budget({"x": (exact["x"] - 2 * 8 * eps).float()}, reference, exact, torch.bfloat16)
    with pytest.raises(AssertionError):
        assert_within_budget({"x": (exact["x"] - 2.1 * 8 * eps).float()}, reference, exact, torch.bfloat16)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_no_number_is_over_every_budget(bad: float) -> None:
    with pytest.raises(AssertionError, match="output"):
        assert_within_budget({"output": torch.tensor([bad, -4.0])}, REFERENCE, EXACT)


def test_every_tensor_over_is_named() -> None:
    exact = {name: torch.zeros(2, dtype=torch.float64) for name in ("output", "gradient of q", "gradient of k")}
    plain = {name: x.float() for name, x in exact.items()}
    wrong = plain | {name: torch.ones(2) for name in ("output", "gradient of k")}
    with pytest.raises(AssertionError, match="output: error 1.*gradient of k: error 1") as error:
        assert_within_budget(wrong, plain, exact)
    assert "gradient of q" not in str(error.value)


def test_an_empty_tensor_has_no_error() -> None:
    assert_within_budget({"x": torch.zeros(0)}, {"x": torch.zeros(0)}, {"x": torch.zeros(0, dtype=torch.float64)})


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"reference must have the candidate's tensors, \['output'\], got \['o'\]"):
        error_budget(REFERENCE, {"o": REFERENCE["output"]}, EXACT)
    with pytest.raises(ValueError, match=r"exact\['output'\] must be float64, got torch\.float32"):
        error_budget(REFERENCE, REFERENCE, REFERENCE)
    with pytest.raises(ValueError, match=r"exact\['output'\] must have the candidate's shape \[2\], got \[1\]"):
        error_budget(REFERENCE, REFERENCE, {"output": EXACT["output"][:1]})
