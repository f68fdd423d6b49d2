"""Gates of declared forms and their gradients against PyTorch in float64, and the bugs that this must catch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import DEVICE, DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st
from poison import poisoned_memory
from scan_laws import Patch, assert_same_bits
from seeding import Bug, in_the_interpreter, over_the_budget, seed
from torch import Tensor

from linear_moe.forms import SigmoidStrength, SoftplusDecay
from linear_moe.kernels import gates, gates_operator
from linear_moe.rules.base import sigmoid_strength, softplus_decay
from linear_moe.testing.budget import assert_within_budget


@dataclass(frozen=True)
class Case:
    """A call, but for the numbers."""

    rows: int
    heads: int = 3
    size: float = 1.0
    dtype: torch.dtype = torch.float32
    decay: bool = True
    strength: bool = True
    largest: float = 2.0


Inputs = dict[str, Tensor]


def draw(case: Case) -> Inputs:
    """The columns side by side, as a projection leaves them, the parameters, and the gates' gradients."""
    torch.manual_seed(0)
    columns = (case.size * torch.randn(case.rows, 2 * case.heads)).to(DEVICE, case.dtype)
    x, y = columns.chunk(2, -1)
    inputs = {"rate": torch.randn(case.heads), "shift": torch.randn(case.heads)}
    inputs |= {f"d_{name}": torch.randn(case.rows, case.heads) for name in ("log_decay", "beta")}
    return {"x": x, "y": y} | {name: z.to(DEVICE) for name, z in inputs.items()}


def by_kernel(case: Case, inputs: Inputs) -> list[Tensor]:
    made = gates_operator.make_gates(
        gates_operator.Decay(inputs["x"], inputs["rate"], inputs["shift"]) if case.decay else None,
        gates_operator.Strength(inputs["y"], case.largest) if case.strength else None,
    )
    assert [gate is not None for gate in made] == [case.decay, case.strength]
    return [gate for gate in made if gate is not None]


def definition(case: Case, inputs: Inputs) -> list[Tensor]:
    """As a rule has it."""
    made = []
    if case.decay:
        made.append(softplus_decay(SoftplusDecay("x", rate="rate", shift="shift"), inputs, inputs))
    if case.strength:
        made.append(sigmoid_strength(SigmoidStrength("y", case.largest), inputs))
    return made


def results(run: Any, case: Case, inputs: Inputs, wide: bool = False) -> Inputs:
    """The gates and the gradients, in float64 if `wide`."""
    inputs = {name: z.double() if wide else z for name, z in inputs.items()}
    names = ["log_decay"] * case.decay + ["beta"] * case.strength
    learned = ["x", "rate", "shift"] * case.decay + ["y"] * case.strength
    leaves = {name: inputs[name].detach().requires_grad_() for name in learned}
    made = run(case, inputs | leaves)
    gradients = torch.autograd.grad(made, list(leaves.values()), [inputs[f"d_{name}"] for name in names])
    found = dict(zip(names, (gate.detach() for gate in made), strict=True))
    return found | {f"d_{name}": z for name, z in zip(learned, gradients, strict=True)}


def check(case: Case) -> None:
    """Gates and gradients are within the error budget."""
    inputs = draw(case)
    plain, exact = results(definition, case, inputs), results(definition, case, inputs, wide=True)
    terms = {}
    if case.decay:
        x = inputs["x"].double() + inputs["shift"]
        by_x = inputs["d_log_decay"] * inputs["rate"].double().exp()
        terms = {"d_shift": (by_x * x.sigmoid()).abs().sum(0), "d_rate": (by_x * F.softplus(x)).abs().sum(0)}
    assert_within_budget(results(by_kernel, case, inputs), plain, exact, terms=terms)


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 700), heads=st.integers(1, 9), size=st.sampled_from([0.0, 1.0, 30.0]), dtype=st.sampled_from(DTYPES),
    gates_made=st.sampled_from([(True, True), (True, False), (False, True)]),
)  # fmt: skip
def test_drawn_shapes_are_within_the_budget(
    rows: int, heads: int, size: float, dtype: torch.dtype, gates_made: tuple[bool, bool]
) -> None:
    check(Case(rows, heads, size, dtype, *gates_made))


def test_no_row() -> None:
    made = results(by_kernel, Case(0), draw(Case(0)))
    assert made["log_decay"].shape == made["d_x"].shape == (0, 3) and not made["d_rate"].any()


def test_gates_that_are_far_open_and_shut() -> None:
    case = Case(2)
    inputs = draw(case) | {"x": torch.tensor([[-200.0] * 3, [200.0] * 3], device=DEVICE)}
    inputs["y"] = inputs["x"]
    made = results(by_kernel, case, inputs)
    assert all(z.isfinite().all() for z in made.values())
    assert made["beta"].tolist() == [[0.0] * 3, [2.0] * 3] and not made["d_y"].any()


def test_same_bits_twice_and_memory_is_written_before_it_is_read() -> None:
    case = Case(600)
    inputs = draw(case)
    once = results(by_kernel, case, inputs)
    assert_same_bits(once, results(by_kernel, case, inputs))
    with poisoned_memory():
        assert_same_bits(once, results(by_kernel, case, inputs))


def test_strides_change_nothing() -> None:
    case = Case(5)
    inputs = draw(case)
    apart = {name: torch.stack([z, z], -1)[..., 0] for name, z in inputs.items()}
    assert_same_bits(results(by_kernel, case, inputs), results(by_kernel, case, apart))


@pytest.mark.parametrize("case", [Case(3), Case(3, decay=False), Case(3, strength=False)], ids=str)
def test_what_torch_asks_of_an_operator(case: Case) -> None:
    inputs = {name: z.clone().requires_grad_() for name, z in draw(case).items()}
    x, rate, shift = (inputs[name] if case.decay else None for name in ("x", "rate", "shift"))
    torch.library.opcheck(gates_operator._gates, (x, inputs["y"] if case.strength else None, rate, shift, case.largest))


CASE = replace(Case(530), heads=5)
BUGS = {
    "the shift forgotten": Bug(gates, "+ _load(shift_ptr, 0, row, head, inside)", "+ 0.0", count=2),
    "the rate's sign": Bug(gates, "log_decay = -tl.exp(_load(rate_ptr", "log_decay = -tl.exp(-_load(rate_ptr"),
    "columns of a row side by side": Bug(gates, "ptr + row * stride + head", "ptr + row * (stride > 0) * 5 + head"),
    "the largest strength forgotten backwards": Bug(gates, "(largest * opened * shut)", "(opened * shut)"),
    "sums of the first rows alone": Bug(gates, "else sum_rows(sums, torch.float32)", "else sums[0]"),
    "the sums changed over": Bug(gates, "tl.store(sums + HEADS, tl.sum(", "tl.store(sums + 0 * HEADS, tl.sum("),
    "the softplus's slope forgotten": Bug(gates, "d_x = d_log_decay * pace * opened", "d_x = d_log_decay * pace"),
    "softplus is relu": Bug(gates, "return tl.maximum(x, 0.0) +", "return tl.maximum(x, 0.0) + 0.0 *"),
    "the last row left out": Bug(gates, "(row < num_rows) &", "(row < num_rows - 1) &"),
}


@in_the_interpreter
@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_caught(bug: str, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(gates_operator, "gates", seed(gates, BUGS[bug], tmp_path))
    with over_the_budget():
        check(CASE)


@in_the_interpreter
def test_a_copy_without_a_bug_keeps_the_budget(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(gates_operator, "gates", seed(gates, None, tmp_path))
    check(CASE)
