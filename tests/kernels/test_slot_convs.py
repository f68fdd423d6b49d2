"""Convolutions of several projections and the gates beside them as one operator: the same as each by itself, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cases import DEVICE
from poison import poisoned_memory
from scan_laws import Patch, assert_same_bits
from seeding import in_the_interpreter, seed_operator
from torch import Tensor

from linear_moe.forms import GateColumns
from linear_moe.kernels import slot_convs_operator as operator
from linear_moe.kernels.gates_operator import Decay, Strength, make_gates
from linear_moe.kernels.slot_conv_operator import segment_of_slots, slot_conv
from linear_moe.kernels.slot_convs_operator import Mixed, Part, slot_convs

HEADS, LARGEST = 2, 1.5
PARTS = [Part(8, 12, "silu", 4), Part(12, 0)]
TOKEN_PART = Part(6, 20, "silu", 3)


@dataclass(frozen=True)
class Case:
    """A call, but for the numbers."""

    tokens: str | None = "read through an index"
    """Or "a row a slot", or None."""
    gates: tuple[bool, bool] | None = (True, True)
    """Whether there are a decay and a strength; None for columns that come out as they are."""
    bias: bool = True
    dtype: torch.dtype = torch.float32

    @property
    def columns(self) -> GateColumns | None:
        """The strength's before the decay's."""
        if self.gates is None:
            return None
        decay, strength = self.gates
        return GateColumns(20 + HEADS * strength if decay else None, 20 if strength else None, HEADS, LARGEST)


BORDERS = torch.tensor([0, 3, 3, 10, 14], device=DEVICE)
NUM_SLOTS, NUM_TOKENS = 16, 6


class Index(NamedTuple):
    """Three slots a token at most, and two that no token has."""

    source: Tensor
    place: Tensor


def index() -> Index:
    place = torch.full((3 * NUM_TOKENS,), -1)
    readers = torch.randperm(3 * NUM_TOKENS, generator=torch.Generator().manual_seed(0))[:NUM_SLOTS]
    place[readers] = torch.arange(NUM_SLOTS)
    return Index((readers // 3).to(DEVICE), place.view(-1, 3).to(DEVICE))


def draw(case: Case) -> dict[str, Tensor]:
    """By name what the operator is differentiable in."""
    torch.manual_seed(0)
    gate_columns = 5 if case.gates is None else HEADS * sum(case.gates)
    channels = 20 + (0 if case.tokens is None else TOKEN_PART.width)
    inputs = {"slots": torch.randn(NUM_SLOTS, 20 + gate_columns), "weight": torch.randn(channels, 4)}
    if case.tokens is not None:
        inputs["tokens"] = torch.randn(NUM_SLOTS if case.tokens == "a row a slot" else NUM_TOKENS, TOKEN_PART.width)
    if case.bias:
        inputs["bias"] = torch.randn(channels)
    inputs = {name: x.to(DEVICE, case.dtype) for name, x in inputs.items()}
    if case.gates is not None and case.gates[0]:
        inputs |= {name: torch.randn(HEADS).to(DEVICE) for name in ("rate", "shift")}
    return inputs


def given(case: Case, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Arguments of `slot_convs`."""
    source, place = index() if case.tokens == "read through an index" else (None, None)
    return inputs | {
        "parts": PARTS, "bias": inputs.get("bias"), "cu_seqlens": BORDERS, "source": source, "place": place,
        "token_part": None if case.tokens is None else TOKEN_PART, "gates": case.columns,
    }  # fmt: skip


def together(case: Case, inputs: dict[str, Tensor]) -> Mixed:
    return operator.slot_convs(**given(case, inputs))


def one_by_one(case: Case, inputs: dict[str, Tensor]) -> Mixed:
    source, place = index() if case.tokens == "read through an index" else (None, None)

    def convolved(x: Tensor, part: Part, **options: Any) -> Tensor:
        rows = slice(part.first_channel, part.first_channel + part.width)
        bias = inputs["bias"][rows] if case.bias else None
        return slot_conv(
            x, inputs["weight"][rows], bias, BORDERS, activation=part.activation, norm_heads=part.norm_heads, **options
        )[0]

    slots = inputs["slots"]
    parts = [convolved(slots[:, :8], PARTS[0]), convolved(slots[:, 8:20], PARTS[1])]
    if case.tokens is not None:
        parts.append(convolved(inputs["tokens"], TOKEN_PART, source=source, place=place))
    if case.columns is None:
        return Mixed(parts, None, None, slots[:, 20:])
    decay, strength, *_ = case.columns
    log_decay, beta = make_gates(
        None if decay is None else Decay(slots[:, decay : decay + HEADS], inputs["rate"], inputs["shift"]),
        None if strength is None else Strength(slots[:, strength : strength + HEADS], LARGEST),
    )
    return Mixed(parts, log_decay, beta, slots[:, slots.shape[1] :])


def results(run: Any, case: Case, inputs: dict[str, Tensor], unused: int | None = None) -> dict[str, Tensor]:
    """Everything that is made, and the gradients of a loss that sees all of it but one output."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    made = run(case, leaves)
    outputs = {f"part {n}": part for n, part in enumerate(made.parts)} | made._asdict()
    outputs = {name: x for name, x in outputs.items() if isinstance(x, Tensor)}
    loss = sum((n + 1) * x.float().sin().sum() for n, x in enumerate(outputs.values()) if n != unused)
    gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    found = {name: x.detach() for name, x in outputs.items()}
    return found | {f"d_{name}": d for name, d in zip(leaves, gradients, strict=True)}


CASES = [
    Case(),
    Case(tokens="a row a slot", bias=False),
    Case(tokens=None, gates=(False, True)),
    Case(gates=(True, False), bias=False),
    Case(gates=None),
    Case(tokens=None, gates=None, bias=False),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


@every_case
@pytest.mark.parametrize("unused", [None, 0, 3])
def test_together_is_as_one_by_one(case: Case, unused: int | None) -> None:
    """Whichever outputs the loss sees."""
    inputs = draw(case)
    assert_same_bits(results(together, case, inputs, unused), results(one_by_one, case, inputs, unused))


@pytest.mark.gpu
@every_case
def test_so_it_is_in_16_bits(case: Case) -> None:
    case = Case(case.tokens, case.gates, case.bias, torch.bfloat16)
    inputs = draw(case)
    assert_same_bits(results(together, case, inputs), results(one_by_one, case, inputs))


@every_case
def test_memory_is_written_before_it_is_read(case: Case) -> None:
    inputs = draw(case)
    once = results(together, case, inputs)
    with poisoned_memory():
        assert_same_bits(once, results(together, case, inputs))


def test_strides_change_nothing() -> None:
    inputs = draw(Case())
    apart = {name: torch.stack([x, x], -1)[..., 0] for name, x in inputs.items()}
    assert_same_bits(results(together, Case(), inputs), results(together, Case(), apart))


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[5]], ids=str)
def test_what_torch_asks_of_the_operator(case: Case, monkeypatch: Patch) -> None:
    calls: list[tuple[Any, ...]] = []
    made = operator._slot_convs
    monkeypatch.setattr(operator, "_slot_convs", lambda *a: (calls.append(a), made(*a))[1])
    together(case, {name: x.requires_grad_() for name, x in draw(case).items()})
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(made, calls[0], test_utils=tests)


@pytest.mark.parametrize(("changes", "message"), [
    ({"parts": []}, "parts must be of a column at least, and one at least"),
    ({"parts": [Part(0, 0), Part(20, 0)]}, r"parts must be of a column at least, and one at least, got widths \[0, 20\]"),
    ({"parts": [Part(20, 0), Part(12, 20)]}, r"slots must be \[R, 32 or more\], as parts add up to, got shape \[16, 24\]"),
    ({"token_part": None}, "tokens and token_part must be given together"),
    ({"parts": [PARTS[0], Part(12, 0, "relu")]}, "activation of a part must be None or"),
    ({"parts": [PARTS[0], Part(12, 0, None, 5)]}, "norm_heads of a part must be a divisor of its width 12, at most 256"),
    ({"parts": [PARTS[0], Part(12, 1)]}, r"parts must be all 26 channels of the weight, each once, got \[\(1, 13\)"),
    ({"source": None}, r"tokens must be \[S, width\] = \[16, 6\], got shape \[6, 6\]"),
    ({"place": None}, "place must be given where tokens are read through a source, got None"),
    ({"gates": GateColumns(21, 20, 2, 1.0)}, "gates must be of the columns from 20 on, side by side"),
    ({"gates": GateColumns(20, None, 2, 1.0)}, "gates must be all 4 columns behind the parts"),
    ({"rate": None}, "rate must be given for a log decay, got None"),
    ({"weight": torch.zeros(26, 9, device=DEVICE)}, "weight must have a W of 1 to 8, got 9"),
])  # fmt: skip
def test_arguments_that_do_not_fit_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        slot_convs(**given(Case(), draw(Case())) | changes)


def test_where_segments_are_given_they_are_not_looked_for() -> None:
    inputs = draw(Case())
    segment = segment_of_slots(BORDERS, NUM_SLOTS)
    made = slot_convs(**given(Case(), inputs), segment=segment)
    for one, other in zip(made.parts, together(Case(), inputs).parts, strict=True):
        assert torch.equal(one, other)


BUGS = {
    "sums of a part in another's channels": ("own, d_conv = sums[..., rows]", "own, d_conv = sums[..., columns]"),
    "a part convolved with another's taps": ("weight, bias = given.weight[channels]", "weight, bias = given.weight[columns]"),
    "the tokens' index not used": ("x, source = given.tokens, given.source", "x, source = given.tokens, given.source.flip(0)"),
    "the gates' gradients changed over": ("(d_x, d_y) = layout", "(d_y, d_x) = layout"),
    "the rate's gradient is the shift's": ("d_shift, d_rate = (d.to", "d_rate, d_shift = (d.to"),
    "the largest strength forgotten": ("gate_kernels.forward(x, y, rate, shift, largest)",
                                       "gate_kernels.forward(x, y, rate, shift, 1.0)"),
    "the columns behind the parts begin too late": ("rest = slots[:, layout.in_parts(tokens is not None)",
                                                    "rest = slots[:, layout.in_parts(False)"),
}  # fmt: skip


@in_the_interpreter
@pytest.mark.parametrize("bug", [None, *BUGS])
def test_seeded_bugs_are_caught(bug: str | None, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(
        operator, "slot_convs", seed_operator(operator, dict([BUGS[bug]] if bug else []), tmp_path).slot_convs
    )
    for case in (Case(), Case(gates=None)):
        inputs = draw(case)
        expected = results(one_by_one, case, inputs)
        made = results(together, case, inputs)
        if any(made[name].shape != x.shape or not torch.equal(made[name], x) for name, x in expected.items()):
            assert bug is not None
            return
    assert bug is None
