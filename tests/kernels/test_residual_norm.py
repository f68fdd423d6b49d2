"""The residual addition with its norm, and its gradients, against PyTorch in float64, and the bugs that this must catch."""

from __future__ import annotations

from collections.abc import Mapping
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
from torch._subclasses.fake_tensor import FakeTensorMode

from linear_moe.kernels import block_parts, residual_norm
from linear_moe.testing.budget import assert_within_budget


@dataclass(frozen=True)
class Case:
    """A call, but for the numbers."""

    rows: int
    width: int = 12
    added: bool = True
    """Whether there is a branch."""
    used: tuple[str, ...] = ("sum", "normed")
    """What the loss sees."""
    size: float = 1.0
    """Of the stream and the branch."""
    dtype: torch.dtype = torch.float32
    """Of the stream."""
    branch_dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype = torch.float32
    normed_dtype: torch.dtype = torch.float32
    eps: float = 1e-5


Inputs = Mapping[str, Tensor]
LEARNED = ("residual", "branch", "weight")


def draw(case: Case) -> dict[str, Tensor]:
    """Inputs, and the gradients of what comes out."""
    # A case that hypothesis tries again is the same case.
    torch.manual_seed(0)
    shape = (case.rows, case.width)
    inputs = {
        "residual": (case.size * torch.randn(shape)).to(case.dtype),
        "weight": torch.randn(case.width).to(case.weight_dtype),
        "d_sum": torch.randn(shape).to(case.dtype),
        "d_normed": torch.randn(shape).to(case.normed_dtype),
    }
    if case.added:
        inputs["branch"] = (case.size * torch.randn(shape)).to(case.branch_dtype)
    return {name: x.to(DEVICE) for name, x in inputs.items()}


def definition(inputs: Inputs, case: Case) -> tuple[Tensor, Tensor]:
    """As a block has it, each step in float32, and the sum rounded as the stream is."""
    residual, branch, weight = inputs["residual"], inputs.get("branch"), inputs["weight"]
    wide = torch.promote_types(residual.dtype, torch.float32)
    summed = residual if branch is None else (residual.to(wide) + branch.to(wide)).to(residual.dtype)
    normed = F.rms_norm(summed.to(wide), (case.width,), weight.to(wide), case.eps)
    return summed, normed if wide == torch.float64 else normed.to(case.normed_dtype)


def kernels(inputs: Inputs, case: Case) -> tuple[Tensor, Tensor]:
    """The kernels."""
    return block_parts.add_and_norm(
        inputs["residual"], inputs.get("branch"), inputs["weight"], eps=case.eps, dtype=case.normed_dtype
    )


def results(run: Any, case: Case, inputs: Inputs, wide: bool = False) -> dict[str, Tensor]:
    """What `run` makes of the inputs, in float64 if `wide`, and its gradients, `d_` before their names."""
    tensors = {name: x.double() if wide else x for name, x in inputs.items()}
    learned = {name: tensors[name].detach().requires_grad_() for name in LEARNED if name in tensors}
    made = dict(zip(("sum", "normed"), run(tensors | learned, case), strict=True))
    gradients = torch.autograd.grad(
        [made[name] for name in case.used], list(learned.values()), [tensors[f"d_{name}"] for name in case.used],
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    return {name: x.detach() for name, x in made.items()} | dict(
        zip([f"d_{name}" for name in learned], gradients, strict=True)
    )


def terms(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """What the results are sums and differences of, each number without its sign: the norm takes out what lies along s."""
    wide = {name: x.double() for name, x in inputs.items()}
    summed = wide["residual"] + wide.get("branch", 0)
    whole = wide["residual"].abs() + wide.get("branch", torch.zeros(())).abs()
    factor = torch.rsqrt(summed.square().mean(-1, keepdim=True) + case.eps)
    normed, d_normed = factor * whole, wide["d_normed"].abs() * wide["weight"].abs()
    d_sum = factor * (d_normed + normed * (d_normed * normed).mean(-1, keepdim=True)) + wide["d_sum"].abs()
    return {
        "sum": whole,
        "normed": normed * wide["weight"].abs(),
        "d_residual": d_sum,
        "d_branch": d_sum,
        "d_weight": (wide["d_normed"].abs() * normed).sum(0),
    }


def check(case: Case, inputs: Inputs | None = None) -> None:
    """Outputs and gradients are within the error budget."""
    inputs = draw(case) if inputs is None else inputs
    candidate = results(kernels, case, inputs)
    # What lies between the inputs and a result is rounded to the stream's dtype, whatever the result's own.
    narrow = torch.finfo(case.dtype).eps > torch.finfo(torch.float32).eps
    assert_within_budget(
        candidate, results(definition, case, inputs), results(definition, case, inputs, wide=True),
        case.dtype if narrow else None, terms=terms(case, inputs),
    )  # fmt: skip


@st.composite
def cases(draw: st.DrawFn) -> Case:
    small = DEVICE == "cpu"
    return Case(
        rows=draw(st.integers(1, 40 if small else 500)),
        width=draw(st.integers(1, 100 if small else 3000)),
        added=draw(st.booleans()),
        used=draw(st.sampled_from([("sum", "normed"), ("normed",)])),
        size=draw(st.sampled_from([1e-3, 1.0, 30.0])),
        dtype=draw(st.sampled_from(DTYPES)),
        branch_dtype=draw(st.sampled_from(DTYPES)),
        weight_dtype=draw(st.sampled_from(DTYPES)),
        normed_dtype=draw(st.sampled_from(DTYPES)),
        eps=draw(st.sampled_from([1e-5, 1e-2])),
    )


@settings(max_examples=20 if DEVICE == "cpu" else 200)
@given(cases())
def test_drawn_shapes_are_within_the_budget(case: Case) -> None:
    check(case)


HALF = DTYPES[-1]
MIXED = Case(65, width=100, branch_dtype=HALF, normed_dtype=HALF)
"""As under autocast: a float32 stream, the rest in 16 bits."""


@pytest.mark.parametrize(
    "case",
    [
        Case(1, width=1),
        Case(7, width=5, added=False),
        Case(residual_norm.LAUNCH.rows, width=64),
        replace(MIXED, rows=2 * residual_norm.LAUNCH.rows + 1),
        Case(2, width=residual_norm.LARGEST_WIDTH),
        Case(3, width=1024, dtype=HALF, branch_dtype=HALF, weight_dtype=HALF, normed_dtype=HALF),
    ],
    ids=str,
)
def test_sizes(case: Case) -> None:
    check(case)


def test_no_row() -> None:
    made = results(kernels, Case(0), draw(Case(0)))
    assert made["sum"].shape == made["normed"].shape == made["d_residual"].shape == made["d_branch"].shape == (0, 12)
    assert made["d_weight"].shape == (12,) and not made["d_weight"].any()


EXAMPLES = {
    "mixed": replace(MIXED, rows=21),
    "float32": Case(19, width=7),
    "the first norm": Case(5, added=False, normed_dtype=HALF),
    "the last norm": Case(5, branch_dtype=HALF, used=("normed",)),
}
every_example = pytest.mark.parametrize("case", EXAMPLES.values(), ids=EXAMPLES)


@every_example
def test_dtypes_are_those_asked_for(case: Case) -> None:
    made = results(kernels, case, inputs := draw(case))
    assert made["sum"].dtype == case.dtype and made["normed"].dtype == case.normed_dtype
    assert all(made[f"d_{name}"].dtype == inputs[name].dtype for name in LEARNED if name in inputs)


def test_only_the_stream_goes_on() -> None:
    case = replace(MIXED, rows=3, used=("sum",))
    made, inputs = results(kernels, case, given := draw(case)), given
    assert torch.equal(made["d_residual"], inputs["d_sum"])
    assert torch.equal(made["d_branch"], inputs["d_sum"].to(HALF)) and not made["d_weight"].any()


@pytest.mark.parametrize("frozen", LEARNED)
def test_what_is_frozen_gets_no_gradient_and_changes_none(frozen: str) -> None:
    case = EXAMPLES["mixed"]
    inputs = draw(case)
    expected = results(kernels, case, inputs)
    learned = {name: inputs[name].clone().requires_grad_(name != frozen) for name in LEARNED}
    summed, normed = kernels(inputs | learned, case)
    torch.autograd.backward([summed, normed], [inputs["d_sum"], inputs["d_normed"]])
    for name, x in learned.items():
        assert x.grad is None if name == frozen else torch.equal(x.grad, expected[f"d_{name}"]), name


def test_a_nan_stays_with_its_row() -> None:
    case = EXAMPLES["mixed"]
    inputs = draw(case)
    expected = results(kernels, case, inputs)
    ill = inputs | {"branch": inputs["branch"].clone()}
    ill["branch"][4, 3] = torch.nan
    made = results(kernels, case, ill)
    assert made["normed"][4].isnan().all() and made["d_weight"].isnan().all()
    others = torch.arange(case.rows, device=DEVICE) != 4
    for name in ("sum", "normed", "d_residual", "d_branch"):
        assert torch.equal(made[name][others], expected[name][others]), name


def test_a_row_has_the_same_bits_beside_any_others() -> None:
    case = MIXED
    inputs = draw(case)
    together = results(kernels, case, inputs)
    some = slice(17, 20)
    alone = results(kernels, replace(case, rows=3), {n: x if n == "weight" else x[some] for n, x in inputs.items()})
    for name in ("sum", "normed", "d_residual", "d_branch"):
        assert torch.equal(together[name][some], alone[name]), name


@every_example
def test_same_bits_twice_and_memory_is_written_before_it_is_read(case: Case) -> None:
    inputs = draw(case)
    once = results(kernels, case, inputs)
    assert_same_bits(once, results(kernels, case, inputs))
    with poisoned_memory():
        assert_same_bits(once, results(kernels, case, inputs))


@every_example
def test_strides_and_further_dims_change_nothing(case: Case) -> None:
    inputs = draw(case)
    expected = results(kernels, case, inputs)
    apart = {name: torch.stack([x, x], -1)[..., 0] for name, x in inputs.items()}
    assert not any(x.is_contiguous() for x in apart.values())
    assert_same_bits(expected, results(kernels, case, apart))
    deep = {name: x if x.dim() == 1 else x[None, :, None] for name, x in inputs.items()}
    made = results(kernels, case, deep)
    assert_same_bits(expected, {name: x if x.dim() == 1 else x[0, :, 0] for name, x in made.items()})


@every_example
def test_what_torch_asks_of_an_operator(case: Case) -> None:
    inputs = draw(replace(case, rows=2))
    given = [inputs[name].requires_grad_() if name in inputs else None for name in LEARNED]
    torch.library.opcheck(
        block_parts._residual_norm, (*given, case.eps, case.normed_dtype),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static"),
    )  # fmt: skip


@every_example
def test_fake_tensors_have_the_shapes_of_real_ones(case: Case) -> None:
    inputs = draw(case)
    real = results(kernels, case, inputs)
    with FakeTensorMode() as mode:
        fake = results(kernels, case, {name: mode.from_tensor(x) for name, x in inputs.items()})
    assert fake.keys() == real.keys()
    for name, x in fake.items():
        assert (x.shape, x.dtype, x.device) == (real[name].shape, real[name].dtype, real[name].device), name


@every_example
def test_compiled_into_one_graph_it_is_the_same(case: Case) -> None:
    case = replace(case, rows=3)
    inputs = draw(case)

    def run(tensors: Inputs, case: Case) -> tuple[Tensor, Tensor]:
        # Something of the compiler's own before and after.
        summed, normed = kernels({**tensors, "residual": 2 * tensors["residual"]}, case)
        return summed + 1, normed + 1

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return run(tensors, case)

    assert_same_bits(results(run, case, inputs), results(lambda tensors, _: compiled(dict(tensors)), case, inputs))


BAD = {
    "residual": (lambda x: x[..., :0], r"residual must be \[..., D\] with D from 1 to 8192, got \[4, 0\]"),
    "residual dtype": (lambda x: x.double(), "residual must be of dtype float32, bfloat16, float16, got torch.float64"),
    "branch": (lambda x: x[1:], r"branch must be \[..., D\] = \[4, 12\], got shape \[3, 12\]"),
    "branch device": (lambda x: x.to("meta"), "branch must be on the device .*, got meta"),
    "weight": (lambda x: x[1:], r"weight must be \[D\] = \[12\], got shape \[11\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    change, message = BAD[case]
    inputs, name = draw(Case(4)), case.split()[0]
    with pytest.raises(ValueError, match=message):
        kernels(inputs | {name: change(inputs[name])}, Case(4))


def test_a_bad_dtype_is_named() -> None:
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16 or float16, got torch.float64"):
        kernels(draw(Case(4)), Case(4, normed_dtype=torch.float64))


FEW = Case(5, width=12, branch_dtype=HALF)
FAINT = replace(FEW, size=1e-3)
LONG = replace(FEW, rows=residual_norm.LAUNCH.rows + 3)
BUGS = {
    "the branch is forgotten": (FEW, "x.to(tl.float32) + branch.to(tl.float32)", "x.to(tl.float32)"),
    "the mean is of the whole tile": (FEW, "tl.sum(x * x, 0) / WIDTH", "tl.sum(x * x, 0) / BLOCK"),
    "the epsilon is forgotten": (FAINT, "/ WIDTH + eps)", "/ WIDTH + 1e-12)"),
    "the weight is forgotten": (FEW, "(x * factor * weight)", "(x * factor)"),
    "the weight has no part in a gradient": (FEW, "d_normed = d_output * weight", "d_normed = d_output"),
    "the norm is taken as a constant": (FEW, "(d_normed - normed * along)", "d_normed"),
    "the gradient's mean is of the whole tile": (FEW, "normed, 0) / WIDTH", "normed, 0) / BLOCK"),
    "the norm's factor is forgotten": (FEW, "normed * along) * factor", "normed * along)"),
    "the stream's own gradient is forgotten": (FEW, "d_x += tl.load", "d_x += 0.0 * tl.load"),
    "the last row's part of the weight's gradient": (FEW, "d_weight += ", "d_weight = "),
    "the last row of a program is left out": (LONG, "first_row, ROWS)", "first_row, ROWS - 1)"),
    "programs share a row of partial sums": (LONG, "d_weight_ptr + program * WIDTH", "d_weight_ptr"),
    "the last column is left out": (
        LONG, "(sum_ptr + at, x, mask=inside)", "(sum_ptr + at, x, mask=column < WIDTH - 1)",
    ),
}  # fmt: skip


@in_the_interpreter
@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_caught(bug: str, tmp_path: Path, monkeypatch: Patch) -> None:
    case, right, wrong = BUGS[bug]
    monkeypatch.setattr(block_parts, "residual_norm", seed(residual_norm, Bug(residual_norm, right, wrong), tmp_path))
    with over_the_budget():
        check(case)


@in_the_interpreter
@pytest.mark.parametrize("case", [LONG, FAINT], ids=["long", "faint"])
def test_a_copy_without_a_bug_keeps_the_budget(case: Case, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(block_parts, "residual_norm", seed(residual_norm, None, tmp_path))
    check(case)


@pytest.mark.gpu
def test_more_programs_than_other_grid_dimensions_hold() -> None:
    case = Case(600_000, width=8)
    inputs = draw(case)
    together, some = results(kernels, case, inputs), slice(case.rows - 100, None)
    alone = results(kernels, replace(case, rows=100), {n: x if n == "weight" else x[some] for n, x in inputs.items()})
    for name in ("sum", "normed", "d_residual", "d_branch"):
        assert torch.equal(together[name][some], alone[name]), name
