"""What becomes of one token's projections, and the convolution's inputs, against PyTorch in float64; and bugs to be caught."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import DEVICE, DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st
from poison import poisoned_memory
from scan_laws import assert_same_bits
from seeding import in_the_interpreter, over_the_budget, seed_operator
from torch import Tensor
from torch.nn import functional

from linear_moe.kernels import decode_tokens
from linear_moe.kernels.decode_tokens import COPIED, MADE, Conv, Gate, Gates, Part
from linear_moe.testing.budget import assert_within_budget


@dataclass(frozen=True)
class Kind:
    """A part, but for where it lies."""

    by_token: bool = False
    width: int = 6
    conv: bool = True
    silu: bool = True
    head: int = 0


@dataclass(frozen=True)
class Case:
    """A call, but for the numbers."""

    kinds: tuple[Kind, ...]
    tokens: int = 2
    fan_out: int = 2
    states: int = 4
    taps: int = 4
    bias: bool = True
    pads: bool = False
    gates: str = "both"
    """What gates there are: "both", "decay", "strength" or "none"."""
    gates_by_token: bool = False
    heads: int = 2
    size: float = 1.0
    """Of the gates' projections."""
    dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Call:
    """A case with its layout: columns that nobody asks for lie between those of the parts."""

    case: Case
    parts: tuple[Part, ...]
    decay: Gate | None
    strength: Gate | None
    columns: tuple[int, int]
    """Of the slots and of the tokens."""
    channels: int


def call_of(case: Case) -> Call:
    columns, channel, parts = [0, 0], 0, []

    def place(by_token: bool, width: int) -> int:
        columns[by_token] += width + 1
        return columns[by_token] - width

    for kind in case.kinds:
        column = place(kind.by_token, kind.width)
        first = channel if kind.conv else -1
        channel += kind.width if kind.conv else 0
        parts.append(Part(kind.by_token, column, kind.width, first, kind.silu, kind.head))
    by_token = case.gates_by_token
    gates = [
        Gate(by_token, place(by_token, case.heads)) if case.gates in ("both", name) else None
        for name in ("decay", "strength")
    ]
    return Call(case, tuple(parts), *gates, (columns[0], columns[1]), channel)


def draw(call: Call) -> dict[str, Tensor]:
    """What is not there is left out."""
    case = call.case
    S, F, M = case.tokens, case.fan_out, case.states
    inputs = {"memory": torch.rand(S, M).argsort(1)[:, :F].contiguous()}
    for name, rows, width in (("slots", S * F, call.columns[0]), ("shared", S, call.columns[1])):
        if width:
            inputs[name] = torch.randn(rows, width).to(case.dtype)
    for gate in (call.decay, call.strength):
        if gate is not None:
            inputs["shared" if gate.by_token else "slots"][:, gate.column : gate.column + case.heads] *= case.size
    if call.channels:
        inputs["state"] = torch.randn(S, M, case.taps, call.channels).to(case.state_dtype)
        inputs["weight"] = torch.randn(call.channels, case.taps).to(case.dtype)
        if case.bias:
            inputs["bias"] = torch.randn(call.channels).to(case.dtype)
    if call.decay is not None:
        inputs |= {"rate": torch.randn(case.heads), "shift": torch.randn(case.heads)}
    if case.pads:
        inputs["valid"] = torch.arange(S) % 2 == 1
    return {name: x.to(DEVICE) for name, x in inputs.items()}


def kernels(module: Any, call: Call, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What was made, by name; the state too, as it is after."""
    case, state = call.case, inputs.get("state")
    state = None if state is None else state.clone()
    conv = None if state is None else Conv(state, inputs["weight"], inputs.get("bias"))
    gates = None
    if case.gates != "none":
        gates = Gates(case.heads, call.decay, inputs.get("rate"), inputs.get("shift"), call.strength, 2.0)
    made = module.make_tokens(
        inputs.get("slots"), inputs.get("shared"), call.parts, num_states=case.states, memory=inputs["memory"],
        valid=inputs.get("valid"), conv=conv, gates=gates,
    )  # fmt: skip
    found = {f"part {i}": x for i, x in enumerate(made.parts)} | {"rows": made.rows}
    found |= {"log_decay": made.log_decay, "beta": made.beta, "state": state}
    return {name: x for name, x in found.items() if x is not None}


def definition(call: Call, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same in the dtype of float64 inputs, or in float32 rounded once. A pad's parts are as if nothing came before."""
    case = call.case
    S, F, M = case.tokens, case.fan_out, case.states
    columns = {"slots": inputs.get("slots"), "shared": inputs.get("shared")}
    slots = {
        by_token: None if x is None else (x.repeat_interleave(F, 0) if by_token else x)
        for by_token, x in ((False, columns["slots"]), (True, columns["shared"]))
    }
    rows = torch.arange(S, device=DEVICE)[:, None] * M + inputs["memory"]
    if "valid" in inputs:
        rows = torch.where(inputs["valid"][:, None], rows, -1)
    rows = rows.flatten()
    real = rows >= 0
    found: dict[str, Tensor] = {"rows": rows}
    state = inputs["state"].clone().flatten(0, 1) if "state" in inputs else None
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32

    def of(by_token: bool, column: int, width: int) -> Tensor:
        x = slots[by_token]
        assert x is not None
        return x[:, column : column + width]

    for i, part in enumerate(call.parts):
        z = of(part.by_token, part.column, part.width)
        dtype = z.dtype
        z = z.to(torch.promote_types(dtype, torch.float32))
        if part.channel >= 0:
            assert state is not None
            channels = slice(part.channel, part.channel + part.width)
            before = torch.where(
                real[:, None, None], state[rows.clamp_min(0)][:, 1:, channels].to(dtype).to(z.dtype), 0
            )
            window = torch.cat((before, z[:, None]), 1)
            state[rows[real], :, channels] = window[real].to(state.dtype)
            z = (window * inputs["weight"][channels].T.to(z.dtype)).sum(1)
            if "bias" in inputs:
                z = z + inputs["bias"][channels].to(z.dtype)
        y = functional.silu(z) if part.silu else z
        if part.head:
            heads = y.unflatten(-1, (-1, part.head))
            y = (heads * torch.rsqrt(heads.square().sum(-1, keepdim=True) + 1e-6)).flatten(-2)
        found[f"part {i}"] = y.to(dtype)
    if call.decay is not None:
        x = of(*call.decay, case.heads).to(torch.promote_types(wide, inputs["rate"].dtype))
        found["log_decay"] = -inputs["rate"].exp() * functional.softplus(x + inputs["shift"], threshold=80)
    if call.strength is not None:
        x = of(*call.strength, case.heads)
        found["beta"] = 2 * torch.sigmoid(x.to(torch.promote_types(x.dtype, torch.float32)))
    if state is not None:
        found["state"] = state.unflatten(0, (S, M))
    return found


def check(case: Case, module: Any = decode_tokens) -> None:
    """Numbers within the error budget; rows, what is carried and what is left alone bit for bit."""
    call = call_of(case)
    inputs = draw(call)
    made, plain = kernels(module, call, inputs), definition(call, inputs)
    exact = definition(call, {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()})
    assert made.keys() == plain.keys()
    for name in ("rows", "state"):
        assert name not in made or torch.equal(made[name], plain[name]), f"other {name}"
    numbers = [
        {name: x for name, x in found.items() if name not in ("rows", "state")} for found in (made, plain, exact)
    ]
    assert all(numbers[0][name].dtype == numbers[1][name].dtype for name in numbers[0])
    # An exponential is as far off as its exponent, whose rounding grows with it.
    terms = {name: (1 + case.size) * x.abs() for name, x in numbers[2].items()}
    assert_within_budget(*numbers, terms=terms)


GATED = (
    Kind(by_token=True, width=10, head=5),
    Kind(width=10, head=5),
    Kind(width=7),
    Kind(by_token=True, width=3, conv=False, silu=False),
    Kind(width=4, conv=False),
)
SOME = Case(GATED)


@settings(max_examples=15 if DEVICE == "cpu" else 150)
@given(data=st.data())
def test_drawn_calls_are_within_the_budget(data: st.DataObject) -> None:
    small = DEVICE == "cpu"

    def kind() -> Kind:
        head = data.draw(st.sampled_from([0, 0, 1, 5, 16, 33]), label="head")
        width = data.draw(st.integers(1, 3), label="heads") * head or data.draw(st.integers(1, 40), label="width")
        flags = [data.draw(st.booleans(), label=name) for name in ("by token", "conv", "silu")]
        return Kind(flags[0], width, *flags[1:], head)

    states = data.draw(st.integers(1, 4), label="M")
    check(
        Case(
            tuple(kind() for _ in range(data.draw(st.integers(1, 4), label="parts"))),
            tokens=data.draw(st.integers(0, 4 if small else 40), label="S"),
            fan_out=data.draw(st.integers(1, states), label="F"),
            states=states,
            taps=data.draw(st.integers(1, decode_tokens.LARGEST_WIDTH), label="W"),
            bias=data.draw(st.booleans(), label="bias"),
            pads=data.draw(st.booleans(), label="pads"),
            gates=data.draw(st.sampled_from(["both", "decay", "strength", "none"]), label="gates"),
            gates_by_token=data.draw(st.booleans(), label="gates by token"),
            heads=data.draw(st.integers(1, 5), label="H"),
            size=data.draw(st.sampled_from([1.0, 20.0]), label="size"),
            dtype=data.draw(st.sampled_from(DTYPES), label="dtype"),
            state_dtype=data.draw(st.sampled_from(DTYPES), label="state's dtype"),
        )
    )


@pytest.mark.parametrize(
    "case",
    [
        Case((Kind(width=2 * MADE.channels + 3), Kind(width=MADE.channels, by_token=True)), tokens=1),
        Case((Kind(width=512, head=256), Kind(width=300)), tokens=1),
        Case((Kind(width=6, head=3), Kind(width=MADE.channels + 1, conv=False)), tokens=2),
        Case((Kind(width=COPIED.channels + 1, conv=False), Kind(by_token=True, conv=False)), tokens=2),
        Case((Kind(by_token=True),), gates="none", tokens=2),
        Case((Kind(),), gates="strength", gates_by_token=True),
    ],
    ids=str,
)
def test_sizes(case: Case) -> None:
    check(case)


def test_one_memory_needs_no_index() -> None:
    x, state = torch.randn(3, 5, device=DEVICE), torch.randn(3, 1, 2, 5, device=DEVICE)
    memory = torch.zeros(3, 1, dtype=torch.int64, device=DEVICE)
    part, weight = Part(True, 0, 5, 0, True), torch.randn(5, 2, device=DEVICE)
    states = state, state.clone()
    made = [
        decode_tokens.make_tokens(None, x, [part], num_states=1, memory=index, conv=Conv(kept, weight, None))
        for index, kept in zip((None, memory), states, strict=True)
    ]
    assert torch.equal(*(each.parts[0] for each in made)) and torch.equal(*states)
    assert made[0].rows.tolist() == [0, 1, 2]


def test_gates_of_any_size_are_exact() -> None:
    """From where a decay is 1 to where it is nothing: within roundings of each number and its exponent, not of the largest."""
    x = torch.linspace(-80, 80, 65, device=DEVICE)[:, None].repeat(1, 2)
    heads = torch.zeros(1, device=DEVICE)
    gates = Gates(1, Gate(True, 0), heads, heads, Gate(True, 1), 1.0)
    made = decode_tokens.make_tokens(None, x, [Part(True, 0, 1)], num_states=1, gates=gates)
    assert made.log_decay is not None and made.beta is not None
    wide = x[:, :1].double()
    torch.testing.assert_close(made.log_decay.double(), -functional.softplus(wide, threshold=100), rtol=1e-5, atol=0)
    torch.testing.assert_close(made.beta.double(), torch.sigmoid(wide), rtol=2e-5, atol=0)


PADDED = replace(SOME, pads=True)


def test_pads_and_unpicked_memories_are_left_alone() -> None:
    call = call_of(PADDED)
    inputs = draw(call)
    once = kernels(decode_tokens, call, inputs)
    ill, used = inputs["state"].clone(), torch.zeros(PADDED.tokens, PADDED.states, dtype=torch.bool, device=DEVICE)
    used.scatter_(1, inputs["memory"], inputs["valid"][:, None].expand_as(inputs["memory"]))
    ill[~used] = torch.nan
    made = kernels(decode_tokens, call, inputs | {"state": ill})
    assert made["state"][~used].isnan().all() and torch.equal(made["state"][used], once["state"][used])
    assert_same_bits(*({name: x for name, x in found.items() if name != "state"} for found in (once, made)))


def test_same_bits_twice_and_everything_is_written() -> None:
    for case in (PADDED, replace(SOME, gates="none", tokens=1)):
        call = call_of(case)
        inputs = draw(call)
        once = kernels(decode_tokens, call, inputs)
        with poisoned_memory():
            assert_same_bits(once, kernels(decode_tokens, call, inputs))
        apart = {name: x if name == "state" else torch.stack([x, x], -1)[..., 0] for name, x in inputs.items()}
        assert_same_bits(once, kernels(decode_tokens, call, apart))


@pytest.mark.parametrize("case", [SOME, replace(SOME, gates="none", kinds=(Kind(by_token=True),))], ids=["all", "few"])
def test_what_torch_asks_of_an_operator(case: Case) -> None:
    call = call_of(case)
    inputs = draw(call)
    names = ("slots", "shared", "memory", "valid", "state", "weight", "bias", "rate", "shift")
    flat = [int(field) for part in call.parts for field in part]
    gates = [[] if gate is None else [int(field) for field in gate] for gate in (call.decay, call.strength)]
    given = (*(inputs.get(name) for name in names), case.states, flat, *gates, case.heads, 2.0)
    torch.library.opcheck(decode_tokens._make_tokens, given)


BAD = {
    "slots": (lambda x: x[0], r"memory_columns must be \[R, \*\], got shape \[30\]"),
    "slots rows": (lambda x: x[1:], r"memory_columns must be \[R, \*\] = \[4, 30\], got shape \[3, 30\]"),
    "slots dtype": (lambda x: x.half(), "token_columns must be of dtype float16, got torch.float32"),
    "slots wide": (lambda x: x.double(), "must be of dtype float(32|64), got torch.float(32|64)"),
    "shared": (lambda x: x[1:], r"token_columns must be \[S, \*\] = \[2, 15\], got shape \[1, 15\]"),
    "memory dtype": (lambda x: x.int(), "memory must be of dtype int64, got torch.int32"),
    "state": (lambda x: x[:, 1:], r"conv.state must be \[B, M, W, C\] = \[2, 4, 4, 27\], got shape \[2, 3, 4, 27\]"),
    "state layout": (lambda x: x.mT.contiguous().mT, "conv.state must be contiguous, got strides"),
    "weight": (lambda x: x[1:], r"parts\[2\] must lie in the 26 channels of conv, got 7 from 20"),
    "weight taps": (lambda x: x.repeat(1, 3), r"conv.weight must be \[C, W\] with a W of 1 to 8, got 12"),
    "bias": (lambda x: x[1:], r"conv.bias must be \[C\] = \[27\], got shape \[26\]"),
    "rate": (lambda x: x[1:], r"gates.rate must be \[H\] = \[2\], got shape \[1\]"),
    "shift device": (lambda x: x.to("meta"), "gates.shift must be on the device of the columns, .*, got meta"),
    "valid": (lambda x: x.float(), "valid must be of dtype bool, got torch.float32"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    change, message = BAD[case]
    call = call_of(replace(SOME, pads=True))
    inputs, name = draw(call), case.split()[0]
    with pytest.raises(ValueError, match=message):
        kernels(decode_tokens, call, inputs | {name: change(inputs[name])})


def test_what_does_not_fit_together_is_named() -> None:
    x = torch.randn(3, 5, device=DEVICE)
    make = decode_tokens.make_tokens
    for arguments, message in (
        ((None, None, [Part(True, 0, 5)]), "memory_columns or token_columns must be given, got neither"),
        ((None, x, []), "parts must have one at least, got none"),
        ((None, x, [Part(True, 1, 5)]), r"parts\[0\] must lie in the 5 token_columns, got 5 from 1"),
        ((None, x, [Part(False, 0, 5)]), r"parts\[0\] must lie in the 0 memory_columns, got 5 from 0"),
        ((None, x, [Part(True, 0, 5, -1, False, 2)]), r"parts\[0\].head must be a divisor of its width, 5"),
        ((None, x, [Part(True, 0, 5, 0)]), r"parts\[0\] must lie in the 0 channels of conv"),
    ):
        with pytest.raises(ValueError, match=message):
            make(*arguments, num_states=1)
    with pytest.raises(ValueError, match="memory must be given where there are 2 states, got none"):
        make(None, x, [Part(True, 0, 5)], num_states=2)
    with pytest.raises(ValueError, match="gates.strength must lie in the 5 token_columns, got 4 from 2"):
        make(None, x, [Part(True, 0, 5)], num_states=1, gates=Gates(4, strength=Gate(True, 2)))
    with pytest.raises(ValueError, match="gates.rate and gates.shift must be given with a decay"):
        make(None, x, [Part(True, 0, 5)], num_states=1, gates=Gates(4, Gate(True, 1)))


# None of them writes out of bounds.
BUGS: dict[str, tuple[Case, dict[str, str]]] = {
    "a pad has a memory": (PADDED, {"tl.load(valid_ptr + token) != 0, row, -1": "tl.load(valid_ptr + token) != 0, row, row"}),
    "every sequence is the first": (SOME, {"row = token * STATES": "row = token * 0"}),
    "what is carried is not shifted": (
        SOME, {"tl.store(state_at + tap * CHANNELS, taps[tap]": "tl.store(state_at + tap * CHANNELS, taps[WIDTH - 1]"},
    ),
    "what is carried is unshifted": (SOME, {"for tap in tl.static_range(1, WIDTH)": "for tap in tl.static_range(WIDTH - 1)"}),
    "the taps are turned round": (SOME, {"channel * WIDTH + tap": "channel * WIDTH + WIDTH - 1 - tap"}),
    "the weight's strides are swapped": (SOME, {"channel * WIDTH + tap": "tap * CHANNELS + channel"}),
    "the bias is of the next channels": (SOME, {"bias_ptr + channel,": "bias_ptr + (channel + 1) % CHANNELS,"}),
    "a part's channels are the first": (SOME, {"bias_ptr, row, CHANNEL + place": "bias_ptr, row, place"}),
    "nothing goes through SiLU": (SOME, {"y *= _sigmoid(y)": "pass"}),
    "a norm is a sum": (SOME, {"y *= tl.rsqrt(tl.sum(tl.where(inside, y * y, 0.0), 0)": "y *= tl.rsqrt(tl.sum(y, 0)"}),
    "a norm's tile is the part's first": (SOME, {"place = tile * TILE + lane": "place = lane"}),
    "columns are counted from the first": (SOME, {"token, COLUMN + place, inside": "token, place, inside"}),
    "a token's columns are another's": (
        SOME, {"token_ptr + token * TOKEN_COLUMNS": "token_ptr + slot % 2 * TOKEN_COLUMNS"},
    ),
    "outputs begin where the first does": (SOME, {"parts_ptr + tl.full((), START, tl.int64) * num_slots": "parts_ptr"}),
    "a strength is at most 1": (SOME, {"largest * _sigmoid(x)": "_sigmoid(x)"}),
    "a decay without its shift": (SOME, {"* softplus(x + shift)": "* softplus(x)"}),
    "a rate without its exponential": (SOME, {"-tl.exp(rate)": "-rate"}),
    "a decay is the strength": (SOME, {"DECAY[1] + head": "STRENGTH[1] + head"}),
    "inputs before are not rounded": (
        replace(SOME, dtype=torch.float16), {"other=0.0).to(DTYPE).to(tl.float32)": "other=0.0).to(tl.float32)"},
    ),
}  # fmt: skip


@in_the_interpreter
@pytest.mark.parametrize("bug", [None, *BUGS])
def test_seeded_bugs_are_caught(bug: str | None, tmp_path: Path) -> None:
    case, texts = (SOME, {}) if bug is None else BUGS[bug]
    module = seed_operator(decode_tokens, texts, tmp_path)
    if bug is None:
        check(case, module)
        return
    with over_the_budget("other"):
        check(case, module)
