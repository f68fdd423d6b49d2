"""Sums of a token's slots, and the gradients of the weighted ones, against PyTorch in float64, and the bugs this must catch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import DEVICE, DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st
from poison import poisoned_memory
from scan_laws import Patch, assert_same_bits
from seeding import Bug, in_the_interpreter, over_the_budget, seed
from torch import Tensor

from linear_moe.kernels import mixing, slot_sum
from linear_moe.testing.budget import assert_within_budget


@dataclass(frozen=True)
class Case:
    """A call, but for the numbers."""

    tokens: int
    fan_out: int = 2
    channels: int = 12
    added: bool = True
    """Whether there is an addend."""
    dtype: torch.dtype = torch.float32
    """Of the slots."""
    addend_dtype: torch.dtype = torch.float32
    sum_dtype: torch.dtype = torch.float32


Inputs = Mapping[str, Tensor]
LEARNED = ("slots", "weights", "addend")


def draw(case: Case) -> dict[str, Tensor]:
    """Inputs, and the gradient of the sum."""
    torch.manual_seed(0)
    S, F, C = case.tokens, case.fan_out, case.channels
    inputs = {
        "slots": torch.randn(S * F, C).to(case.dtype),
        "weights": torch.rand(S, F),
        "place": torch.randperm(S * F),
        "d_sum": torch.randn(S, C).to(case.sum_dtype),
    }
    if case.added:
        inputs["addend"] = torch.randn(S, C).to(case.addend_dtype)
    return {name: x.to(DEVICE) for name, x in inputs.items()}


def definition(inputs: Inputs, case: Case) -> Tensor:
    """As the layers have it."""
    weights, addend = inputs["weights"], inputs.get("addend")
    reads = inputs["slots"].to(weights.dtype)[inputs["place"]].unflatten(0, weights.shape)
    total = (weights[..., None] * reads).sum(1)
    total = total if addend is None else total + addend
    return total if weights.dtype == torch.float64 else total.to(case.sum_dtype)


def kernels(inputs: Inputs, case: Case) -> Tensor:
    """The kernels."""
    return mixing.weighted_sum(
        inputs["slots"], inputs["place"], inputs["weights"], addend=inputs.get("addend"), dtype=case.sum_dtype
    )


def results(run: Any, case: Case, inputs: Inputs, wide: bool = False) -> dict[str, Tensor]:
    """What `run` makes of the inputs, in float64 if `wide`, and its gradients, `d_` before their names."""
    tensors = {name: x.double() if wide and x.is_floating_point() else x for name, x in inputs.items()}
    learned = {name: tensors[name].detach().requires_grad_() for name in LEARNED if name in tensors}
    total = run(tensors | learned, case)
    gradients = torch.autograd.grad(total, list(learned.values()), tensors["d_sum"])
    return {"sum": total.detach()} | dict(zip([f"d_{name}" for name in learned], gradients, strict=True))


def terms(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """What the results are sums of, each number without its sign."""
    bare = {name: x.abs() if x.is_floating_point() else x for name, x in inputs.items()}
    return {name: x.double() for name, x in results(definition, case, bare, wide=True).items()}


def check(case: Case) -> None:
    """Sums and gradients are within the error budget."""
    inputs = draw(case)
    assert_within_budget(
        results(kernels, case, inputs), results(definition, case, inputs), results(definition, case, inputs, wide=True),
        terms=terms(case, inputs),
    )  # fmt: skip


@st.composite
def cases(draw: st.DrawFn) -> Case:
    small = DEVICE == "cpu"
    return Case(
        tokens=draw(st.integers(1, 30 if small else 500)),
        fan_out=draw(st.integers(1, 9)),
        channels=draw(st.integers(1, 100 if small else 3000)),
        added=draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES)),
        addend_dtype=draw(st.sampled_from(DTYPES)),
        sum_dtype=draw(st.sampled_from(DTYPES)),
    )


@settings(max_examples=8 if DEVICE == "cpu" else 200)
@given(cases())
def test_drawn_shapes_are_within_the_budget(case: Case) -> None:
    check(case)


WIDE = Case(3, fan_out=5, channels=slot_sum.LAUNCH.backward // 8 + 7)
"""Of several tiles both ways."""


@pytest.mark.parametrize("case", [Case(1, fan_out=1, channels=1), Case(65, channels=64), WIDE], ids=str)
def test_sizes(case: Case) -> None:
    check(case)


def test_no_token() -> None:
    made = results(kernels, Case(0), draw(Case(0)))
    assert made["sum"].shape == made["d_slots"].shape == (0, 12) and made["d_weights"].shape == (0, 2)


def test_without_weights_some_may_be_missing() -> None:
    slots, place = torch.randn(6, 5, device=DEVICE), torch.tensor([[4, 1], [0, -1], [-1, -1]], device=DEVICE)
    expected = torch.stack([slots[4] + slots[1], slots[0], torch.zeros(5, device=DEVICE)])
    assert torch.equal(mixing.sum_slots(slots, place, []), expected)
    addends = list(torch.randn(3, 3, 5, device=DEVICE).unbind())
    for count in range(4):
        made = mixing.sum_slots(slots, place, addends[:count])
        torch.testing.assert_close(made, sum(addends[:count], expected))
    # The first of more places.
    wider = torch.cat((place, torch.full_like(place, 99)), 1)[:, :2]
    assert torch.equal(mixing.sum_slots(slots, wider, []), expected)


HALF = DTYPES[-1]
EXAMPLES = {
    "mixed": Case(9, fan_out=3, dtype=HALF, addend_dtype=HALF, sum_dtype=HALF),
    "float32": Case(9, fan_out=4, channels=7, added=False),
}
every_example = pytest.mark.parametrize("case", EXAMPLES.values(), ids=EXAMPLES)


@every_example
def test_same_bits_twice_and_memory_is_written_before_it_is_read(case: Case) -> None:
    inputs = draw(case)
    once = results(kernels, case, inputs)
    assert_same_bits(once, results(kernels, case, inputs))
    with poisoned_memory():
        assert_same_bits(once, results(kernels, case, inputs))


@every_example
def test_strides_change_nothing(case: Case) -> None:
    inputs = draw(case)
    apart = {name: torch.stack([x, x], -1)[..., 0] for name, x in inputs.items()}
    assert not any(x.is_contiguous() for x in apart.values())
    assert_same_bits(results(kernels, case, inputs), results(kernels, case, apart))


@every_example
def test_where_a_slot_lies_changes_nothing(case: Case) -> None:
    inputs = draw(case)
    moved = torch.randperm(inputs["place"].numel(), device=DEVICE)
    slots = torch.empty_like(inputs["slots"])
    slots[moved] = inputs["slots"]
    one = results(kernels, case, inputs)
    other = results(kernels, case, inputs | {"slots": slots, "place": moved[inputs["place"]]})
    assert_same_bits(one, other | {"d_slots": other["d_slots"][moved]})


@every_example
def test_what_torch_asks_of_an_operator(case: Case) -> None:
    inputs = draw(replace(case, tokens=2))
    for name in LEARNED:
        if name in inputs:
            inputs[name].requires_grad_()
    place = inputs["place"].view(2, -1)
    torch.library.opcheck(
        mixing._weighted_sum, (inputs["slots"], place, inputs["weights"], inputs.get("addend"), case.sum_dtype),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static"),
    )  # fmt: skip


def test_compiled_into_one_graph_it_is_the_same() -> None:
    case = EXAMPLES["mixed"]
    inputs = draw(case)

    def run(tensors: Inputs, case: Case) -> Tensor:
        # Something of the compiler's own before and after.
        return kernels({**tensors, "slots": 2 * tensors["slots"]}, case) + 1

    compiled = torch.compile(lambda tensors: run(tensors, case), fullgraph=True, backend="aot_eager")
    assert_same_bits(results(run, case, inputs), results(lambda tensors, _: compiled(dict(tensors)), case, inputs))


BAD = {
    "slots": (lambda x: x[0], r"slots must be \[R, C\], got shape \[12\]"),
    "slots dtype": (lambda x: x.double(), "slots must be of dtype float32, bfloat16, float16, got torch.float64"),
    "place": (lambda x: x[1:], r"place must be \[R\] = \[8\], got shape \[7\]"),
    "place dtype": (lambda x: x.int(), "place must be of dtype int64, got torch.int32"),
    "weights": (lambda x: x[1:], r"weights must be \[S, F\] with one of each of the 8 slots, got shape \[3, 2\]"),
    "weights dtype": (lambda x: x.half(), "weights must be of dtype float32, got torch.float16"),
    "addend": (lambda x: x[1:], r"addend must be \[S, C\] = \[4, 12\], got shape \[3, 12\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    change, message = BAD[case]
    inputs, name = draw(Case(4)), case.split()[0]
    with pytest.raises(ValueError, match=message):
        kernels(inputs | {name: change(inputs[name])}, Case(4))


FEW = Case(9, fan_out=3)
BUGS = {
    "the addend is forgotten": (FEW, "total += tl.load(addend_ptr", "total += 0.0 * tl.load(addend_ptr"),
    "the last slot is left out": (FEW, "for f in range(FAN_OUT)", "for f in range(FAN_OUT - 1)"),
    "the first slot's weight is every slot's": (FEW, "(weights_ptr + token * FAN_OUT + f,", "(weights_ptr + token * FAN_OUT,"),
    "slots are taken as they come": (FEW, "place = tl.load(place_ptr + token * place_stride + f, mask=exists, other=-1)",
                                     "place = tl.where(exists, token * FAN_OUT + f, -1)"),
    "the second tile is the first": (WIDE, "(program % NUM_TILES) * BLOCK", "0 * BLOCK"),
    "a gradient's weight is forgotten": (FEW, "(weight[:, None] * d_sum)", "(weight[:, None] * 0.0 + d_sum)"),
    "a weight's gradient is its neighbour's": (
        FEW, "(d_weights_ptr + token * FAN_OUT + slot", "(d_weights_ptr + token * FAN_OUT + FAN_OUT - 1 - slot",
    ),
    "a weight's gradient is of the last tile": (WIDE, "products += ", "products = "),
    "the last token is left out": (FEW, "token < num_tokens", "token < num_tokens - 1"),
}  # fmt: skip


@in_the_interpreter
@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_caught(bug: str, tmp_path: Path, monkeypatch: Patch) -> None:
    case, right, wrong = BUGS[bug]
    monkeypatch.setattr(mixing, "slot_sum", seed(slot_sum, Bug(slot_sum, right, wrong), tmp_path))
    with over_the_budget():
        check(case)


@in_the_interpreter
@pytest.mark.parametrize("case", [FEW, WIDE], ids=["few", "wide"])
def test_a_copy_without_a_bug_keeps_the_budget(case: Case, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(mixing, "slot_sum", seed(slot_sum, None, tmp_path))
    check(case)


@pytest.mark.gpu
def test_tensors_past_the_int32_offsets() -> None:
    case = Case(
        2**20 + 8, fan_out=4, channels=1024, dtype=torch.bfloat16, addend_dtype=torch.bfloat16, sum_dtype=torch.bfloat16
    )
    free, _ = torch.cuda.mem_get_info()
    if free < 2**33 * 5:
        pytest.skip(f"needs {2**33 * 5 / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} are free")
    shape = (case.tokens, case.channels)
    inputs = {
        "slots": torch.randn(4 * case.tokens, case.channels, device=DEVICE, dtype=case.dtype),
        "weights": torch.rand(case.tokens, 4, device=DEVICE),
        "place": torch.randperm(4 * case.tokens, device=DEVICE),
        "addend": torch.randn(shape, device=DEVICE, dtype=case.dtype),
        "d_sum": torch.randn(shape, device=DEVICE, dtype=case.dtype),
    }
    together, some = results(kernels, case, inputs), slice(case.tokens - 100, None)
    places = inputs["place"].view(-1, 4)[some].flatten()
    few = {name: inputs[name][some] for name in ("weights", "addend", "d_sum")}
    few |= {"slots": inputs["slots"][places], "place": torch.arange(400, device=DEVICE)}
    alone = results(kernels, replace(case, tokens=100), few)
    assert torch.equal(together["d_slots"][places], alone["d_slots"])
    for name in ("sum", "d_weights", "d_addend"):
        assert torch.equal(together[name][some], alone[name]), name
