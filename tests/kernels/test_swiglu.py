"""The gated unit and its gradient against PyTorch in float64, and the bugs that this must catch."""

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

from linear_moe.kernels import block_parts, swiglu
from linear_moe.testing.budget import assert_within_budget


@dataclass(frozen=True)
class Case:
    """A call, but for the numbers."""

    rows: int
    width: int = 12
    size: float = 1.0
    dtype: torch.dtype = torch.float32


def draw(case: Case) -> tuple[Tensor, Tensor]:
    """The input, and the gradient of the output."""
    torch.manual_seed(0)
    x, seed = torch.randn(case.rows, 2 * case.width), torch.randn(case.rows, case.width)
    return (case.size * x).to(DEVICE, case.dtype), seed.to(DEVICE, case.dtype)


def definition(x: Tensor) -> Tensor:
    """As a feed-forward has it."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def results(run: Any, x: Tensor, seed: Tensor, wide: bool = False) -> dict[str, Tensor]:
    """The output and the gradient, in float64 if `wide`."""
    x, seed = (y.double() if wide else y for y in (x, seed))
    x = x.detach().requires_grad_()
    output = run(x)
    return {"output": output.detach(), "d_x": torch.autograd.grad(output, x, seed)[0]}


def check(case: Case) -> None:
    """Output and gradient are within the error budget."""
    given = draw(case)
    assert_within_budget(
        results(block_parts.gated_unit, *given), results(definition, *given), results(definition, *given, wide=True)
    )


@settings(max_examples=12 if DEVICE == "cpu" else 200)
@given(
    rows=st.integers(1, 300),
    width=st.integers(1, 100 if DEVICE == "cpu" else 3000),
    size=st.sampled_from([1e-3, 1.0, 30.0]),
    dtype=st.sampled_from(DTYPES),
)
def test_drawn_shapes_are_within_the_budget(rows: int, width: int, size: float, dtype: torch.dtype) -> None:
    check(Case(rows, width, size, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "rows, width", [(1, 1), (7, 5), (65, 64), (129, 16), (2, 1024), (3, swiglu.LAUNCH.columns + 76)]
)
def test_sizes(rows: int, width: int, dtype: torch.dtype) -> None:
    check(Case(rows, width, dtype=dtype))


def test_no_row() -> None:
    made = results(block_parts.gated_unit, *draw(Case(0)))
    assert made["output"].shape == (0, 12) and made["d_x"].shape == (0, 24)


EXAMPLE = Case(200, 20, dtype=DTYPES[-1])


def test_gates_that_are_far_open_and_shut() -> None:
    """No exponential overflows, and neither side's slope is lost."""
    far = torch.tensor([-300.0, -88.0, -20.0, 0.0, 20.0, 88.0, 300.0], device=DEVICE)
    x = torch.cat((far, torch.full_like(far, 2.0)))[None]
    made = results(block_parts.gated_unit, x, torch.ones(1, 7, device=DEVICE))
    exact = results(definition, x, torch.ones(1, 7, device=DEVICE), wide=True)
    for name, y in made.items():
        torch.testing.assert_close(y.double(), exact[name], rtol=1e-5, atol=1e-37)


def test_same_bits_twice_and_memory_is_written_before_it_is_read() -> None:
    given = draw(EXAMPLE)
    once = results(block_parts.gated_unit, *given)
    assert_same_bits(once, results(block_parts.gated_unit, *given))
    with poisoned_memory():
        assert_same_bits(once, results(block_parts.gated_unit, *given))


def test_strides_and_further_dims_change_nothing() -> None:
    x, seed = draw(EXAMPLE)
    expected = results(block_parts.gated_unit, x, seed)
    apart = [torch.stack([y, y], -1)[..., 0] for y in (x, seed)]
    assert_same_bits(expected, results(block_parts.gated_unit, *apart))
    deep = results(block_parts.gated_unit, x[None, :, None], seed[None, :, None])
    assert_same_bits(expected, {name: y[0, :, 0] for name, y in deep.items()})


def test_what_torch_asks_of_an_operator() -> None:
    x, _ = draw(replace(EXAMPLE, rows=2))
    torch.library.opcheck(
        block_parts._swiglu, (x.requires_grad_(),),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static"),
    )  # fmt: skip


def test_compiled_into_one_graph_it_is_the_same() -> None:
    given = draw(replace(EXAMPLE, rows=3))

    def run(x: Tensor) -> Tensor:
        return block_parts.gated_unit(2 * x) + 1

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_same_bits(results(run, *given), results(compiled, *given))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 3), r"x must be \[..., 2W\] with W at least 1, got shape \[2, 3\]"),
        (torch.zeros(2, 0), r"x must be \[..., 2W\] with W at least 1, got shape \[2, 0\]"),
        (torch.zeros(2, 4).double(), "x must be of dtype float32, bfloat16, float16, got torch.float64"),
    ],
)
def test_bad_input_is_named(x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        block_parts.gated_unit(x)


WIDE = Case(5, swiglu.LAUNCH.columns + 76)
BUGS = {
    "the gate is no product with itself": (EXAMPLE, "gate * opened * up", "opened * up"),
    "up is the gate": (EXAMPLE, "tl.load(at + WIDTH,", "tl.load(at,"),
    "open is shut": (EXAMPLE, "opened, shut = ", "shut, opened = "),
    "the gate's slope is its value": (EXAMPLE, "(opened * (1.0 + gate * shut))", "opened"),
    "the gradient of up is the output's": (EXAMPLE, "d_output * (gate * opened)", "d_output * gate"),
    "the halves' gradients are exchanged": (
        EXAMPLE, "d_gate = d_output * up * (opened * (1.0 + gate * shut))\n    d_up = ",
        "d_up = d_output * up * (opened * (1.0 + gate * shut))\n    d_gate = ",
    ),
    "rows share a place": (
        EXAMPLE, "(output_ptr + row * WIDTH + column, output", "(output_ptr + row // 2 * 2 * WIDTH + column, output",
    ),
    "the second tile is the first": (WIDE, "(program % NUM_TILES) * COLUMNS", "0 * COLUMNS"),
    "the last rows are left out": (EXAMPLE, "(row < num_rows)", "(row < num_rows - 1)"),
}  # fmt: skip


@in_the_interpreter
@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_caught(bug: str, tmp_path: Path, monkeypatch: Patch) -> None:
    case, right, wrong = BUGS[bug]
    monkeypatch.setattr(block_parts, "swiglu", seed(swiglu, Bug(swiglu, right, wrong), tmp_path))
    with over_the_budget():
        check(case)


@in_the_interpreter
@pytest.mark.parametrize("case", [EXAMPLE, WIDE], ids=["rows", "wide"])
def test_a_copy_without_a_bug_keeps_the_budget(case: Case, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(block_parts, "swiglu", seed(swiglu, None, tmp_path))
    check(case)


@pytest.mark.gpu
def test_tensors_past_the_int32_offsets() -> None:
    rows, width = 2**20 + 8, 2048
    free, _ = torch.cuda.mem_get_info()
    if free < 2**31 * 12:
        pytest.skip(f"needs {2**31 * 12 / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} are free")
    x = torch.randn(rows, 2 * width, device=DEVICE, dtype=torch.bfloat16)
    seed = torch.randn(rows, width, device=DEVICE, dtype=torch.bfloat16)
    together = results(block_parts.gated_unit, x, seed)
    alone = results(block_parts.gated_unit, x[-100:], seed[-100:])
    assert_same_bits({name: y[-100:] for name, y in together.items()}, alone)
