"""The short convolution along segments against the layers' in float64, what holds exactly, and the bugs that this must catch.

On a machine without a GPU the kernels run in Triton's interpreter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import DEVICE, DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st
from seeding import Bug, in_the_interpreter, over_the_budget, seed
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from linear_moe.kernels import slot_conv as kernels
from linear_moe.kernels import slot_conv_operator as operator
from linear_moe.kernels import slot_conv_state as carried_inputs
from linear_moe.kernels.slot_conv_operator import segment_of_slots, slot_conv
from linear_moe.layers.short_conv import activate, short_conv
from linear_moe.rules.transforms import L2_EPS, l2_norm
from linear_moe.testing.budget import assert_within_budget

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@dataclass(frozen=True)
class Case:
    """A call of `slot_conv`, but for the numbers."""

    lengths: tuple[int, ...]
    spare: int = 0
    """Slots behind the last segment."""
    channels: int = 8
    width: int = 4
    fan_out: int | None = None
    """Slots that a row of x has at most, or None without a source."""
    bias: bool = True
    silu: bool = True
    head: int | None = 4
    state: bool = True
    carry: bool = True
    """Whether the loss sees the new state."""
    output: bool = True
    """Whether it sees the output."""
    apart: int = 0
    """Columns of a row of x that are not convolved."""
    dtype: torch.dtype = torch.float32
    state_dtype: torch.dtype | None = None
    """The inputs' unless given."""

    @property
    def num_slots(self) -> int:
        """R"""
        return sum(self.lengths) + self.spare

    @property
    def num_rows(self) -> int:
        """S: with a source one row more than the slots need, and every row has slots that nothing reads."""
        return self.num_slots if self.fan_out is None else self.num_slots // self.fan_out + 2

    @property
    def cu_seqlens(self) -> Tensor:
        """`[N + 1]`"""
        return torch.tensor([0, *self.lengths]).cumsum(0).to(DEVICE)

    def index(self) -> tuple[Tensor | None, Tensor | None]:
        """Source and place, the same at every call."""
        if self.fan_out is None:
            return None, None
        generator = torch.Generator().manual_seed(self.num_slots)
        readers = torch.randperm(self.num_rows * self.fan_out, generator=generator)[: self.num_slots]
        place = torch.full((self.num_rows * self.fan_out,), -1)
        place[readers] = torch.arange(self.num_slots)
        return (readers // self.fan_out).to(DEVICE), place.view(-1, self.fan_out).to(DEVICE)


Tensors = Mapping[str, Tensor]
Results = tuple[Tensor, Tensor]
Run = Callable[[Case, Tensors], Results]


def draw(case: Case) -> dict[str, Tensor]:
    channels, dtype = case.channels, case.dtype
    inputs = {
        "x": torch.randn(case.num_rows, channels + case.apart).to(dtype),
        "weight": torch.randn(channels, case.width).to(dtype),
    }
    if case.bias:
        inputs["bias"] = torch.randn(channels).to(dtype)
    if case.state:
        inputs["state"] = torch.randn(len(case.lengths), case.width, channels).to(case.state_dtype or dtype)
    return {name: x.to(DEVICE) for name, x in inputs.items()}


def convolve(case: Case, tensors: Tensors) -> Results:
    """The kernels."""
    source, place = case.index()
    start = case.apart // 2
    output, carried = slot_conv(
        tensors["x"][:, start : start + case.channels], tensors["weight"], tensors.get("bias"), case.cu_seqlens,
        source=source, place=place, state=tensors.get("state"), activation="silu" if case.silu else None,
        norm_heads=case.head, return_state=True,
    )  # fmt: skip
    assert carried is not None
    return output, carried


def layers(case: Case, tensors: Tensors) -> Results:
    """What the layers do without kernels."""
    source, _ = case.index()
    start = case.apart // 2
    x = tensors["x"][:, start : start + case.channels]
    x = x if source is None else x.index_select(0, source)
    y, carried = short_conv(x, tensors["weight"], tensors.get("bias"), case.cu_seqlens, tensors.get("state"))
    y = activate(y, "silu" if case.silu else None)
    return (y if case.head is None else l2_norm(y.unflatten(-1, (-1, case.head))).flatten(1)), carried


def results(
    run: Run, case: Case, inputs: Tensors, dtype: torch.dtype | None = None, seed_of_spare: float | None = None
) -> dict[str, Tensor]:
    """What `run` makes of the inputs, in `dtype` if given, and the gradients of one loss, `d_` before their names."""
    tensors = {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in inputs.items()}
    made = dict(zip(("output", "carried"), run(case, tensors), strict=True))
    used = [name for name, wanted in (("output", case.output), ("carried", case.carry)) if wanted]
    used = [name for name in used if made[name].requires_grad]
    generator = torch.Generator(DEVICE).manual_seed(1)
    seeds = {
        name: torch.randn(made[name].shape, generator=generator, device=DEVICE).to(case.dtype).to(made[name].dtype)
        for name in used
    }
    if seed_of_spare is not None:
        seeds["output"][case.num_slots - case.spare :] = seed_of_spare
    gradients = torch.autograd.grad(
        [made[name] for name in used], list(tensors.values()), list(seeds.values()), allow_unused=True,
        materialize_grads=True,
    )  # fmt: skip
    return {name: x.detach() for name, x in made.items()} | dict(
        zip([f"d_{name}" for name in tensors], gradients, strict=True)
    )


def check(case: Case, inputs: Tensors | None = None) -> None:
    inputs = draw(case) if inputs is None else inputs
    reference, exact = results(layers, case, inputs), results(layers, case, inputs, torch.float64)
    assert_within_budget(results(convolve, case, inputs), reference, exact, case.dtype)


def assert_same_bits(one: Tensors, other: Tensors) -> None:
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


@functools.cache
def clean(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs and what comes of them."""
    inputs = draw(case)
    return inputs, results(convolve, case, inputs)


def walk(patch: pytest.MonkeyPatch, walks: int, length: int) -> None:
    """In runs of so many slots, so many at once."""
    patch.setattr(kernels, "walks_of", lambda launch, num_slots, device: (walks, length))


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype) -> Case:
    on_cpu = DEVICE == "cpu"
    head = draw(st.sampled_from([None, 1, 4, 6, 32] if on_cpu else [None, 1, 6, 32, 64, 128, 200, 256]))
    heads = draw(st.integers(1, 3 if on_cpu else 9))
    return Case(
        tuple(draw(st.lists(st.integers(0, 30 if on_cpu else 400), min_size=1, max_size=5))),
        draw(st.sampled_from([0, 1, 5])),
        heads * (head or draw(st.sampled_from([1, 7, 16]))),
        draw(st.integers(1, 8)),
        draw(st.sampled_from([None, 1, 3])),
        bias=draw(st.booleans()),
        silu=draw(st.booleans()),
        head=head,
        state=draw(st.booleans()),
        carry=draw(st.booleans()),
        apart=draw(st.sampled_from([0, 3, 16])),
        dtype=dtype,
        state_dtype=draw(st.sampled_from([None, torch.float32])),
    )


@every_dtype
def test_drawn_cases_are_within_the_budget(dtype: torch.dtype) -> None:
    @settings(max_examples=60 if DEVICE == "cuda" else 8 if dtype == torch.float32 else 3)
    @given(cases(dtype))
    def holds(case: Case) -> None:
        check(case)

    holds()


RAGGED = Case((9, 0, 2, 14, 1, 1, 1, 6), spare=3)
INDEXED = replace(RAGGED, fan_out=3)
PLAIN = Case((9, 0, 2, 14), spare=2, state=False, carry=False, bias=False)
BOTH = pytest.mark.parametrize("case", [RAGGED, INDEXED, PLAIN], ids=["rows", "indexed", "plain"])


@pytest.mark.parametrize(("walks", "length"), [(1, 50), (4, 3), (16, 1), (2, 13)])
def test_any_walk_is_within_the_budget_and_puts_out_the_same(
    walks: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, expected = clean(RAGGED)
    walk(monkeypatch, walks, length)
    made = results(convolve, RAGGED, inputs)
    reference, exact = results(layers, RAGGED, inputs), results(layers, RAGGED, inputs, torch.float64)
    assert_within_budget(made, reference, exact)
    if DEVICE == "cuda":
        # Compiled for another shape, products and sums are fused otherwise.
        return
    # What is summed over slots is summed in another order.
    for name in ("output", "carried", "d_x", "d_state"):
        assert torch.equal(made[name], expected[name]), name


@pytest.mark.parametrize("case", [
    replace(RAGGED, channels=300, head=None), replace(RAGGED, channels=512, head=256),
    replace(INDEXED, channels=512, head=64), replace(RAGGED, channels=200, head=100),
], ids=["wide", "wide heads", "narrow heads", "odd heads"])  # fmt: skip
def test_several_tiles_of_channels(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", [RAGGED, INDEXED], ids=["rows", "indexed"])
def test_either_result_alone(case: Case) -> None:
    check(replace(case, carry=False))
    check(replace(case, output=False))


def test_the_norm_is_the_rules() -> None:
    assert kernels.NORM_EPS.value == L2_EPS
    # Of a head of nothing the gradient is that of a small vector.
    case = replace(PLAIN, silu=False)
    check(case, {name: x * 1e-4 for name, x in draw(case).items()})


@BOTH
def test_same_bits_twice(case: Case) -> None:
    inputs, once = clean(case)
    assert_same_bits(results(convolve, case, inputs), once)


def test_strides_change_nothing() -> None:
    (inputs, expected), apart = clean(RAGGED), replace(RAGGED, apart=6)
    wide = torch.randn(RAGGED.num_rows, RAGGED.channels + 6).to(DEVICE)
    wide[:, 3:-3] = inputs["x"]
    made = results(convolve, apart, inputs | {"x": wide})
    outside = made["d_x"].clone()
    outside[:, 3:-3] = 0
    assert not outside.any()
    assert_same_bits(expected, made | {"d_x": made["d_x"][:, 3:-3]})
    # Even channels that are not side by side.
    turned = {name: torch.stack([x, x], -1)[..., 0] for name, x in inputs.items()}
    assert_same_bits(expected, results(convolve, RAGGED, turned))


@pytest.mark.parametrize("at", [0, 1, 3, 8])
@pytest.mark.parametrize("width", [1, 4])
def test_carried_state_is_the_whole(at: int, width: int) -> None:
    """Cut anywhere, even where a segment has less than W slots, both parts give the bits of the whole."""
    whole = Case((9, 0, 2, 14, 1), width=width)
    tensors = draw(whole)
    output, carried = convolve(whole, tensors)
    parts = [tensors["x"].split(list(whole.lengths))[n] for n in range(5)]
    first = replace(whole, lengths=tuple(min(at, length) for length in whole.lengths))
    second = replace(whole, lengths=tuple(length - min(at, length) for length in whole.lengths))
    head, middle = convolve(first, tensors | {"x": torch.cat([x[:at] for x in parts])})
    tail, end = convolve(second, tensors | {"x": torch.cat([x[at:] for x in parts]), "state": middle})
    joined = [torch.cat(pair) for pair in zip(head.split(first.lengths), tail.split(second.lengths), strict=True)]
    assert torch.equal(torch.cat(joined), output) and torch.equal(end, carried)


@every_dtype
def test_a_segment_without_slots_keeps_its_state(dtype: torch.dtype) -> None:
    """Bit for bit, of whatever dtype; and the gradient goes through it as it is."""
    case = Case((3, 0, 5, 0), dtype=dtype, state_dtype=torch.float32)
    tensors = {name: x.requires_grad_() for name, x in draw(case).items()}
    _, carried = convolve(case, tensors)
    assert carried.dtype == torch.float32
    assert torch.equal(carried[[1, 3]], tensors["state"][[1, 3]])
    seed = torch.randn_like(carried)
    (gradient,) = torch.autograd.grad(carried, tensors["state"], seed)
    assert torch.equal(gradient[[1, 3]], seed[[1, 3]])


@BOTH
def test_nothing_crosses_a_segment(case: Case) -> None:
    """All of one segment is NaN: the others keep their bits, in outputs, states and gradients."""
    (inputs, expected), borders, ill = clean(case), case.cu_seqlens.tolist(), 3
    slots = slice(borders[ill], borders[ill + 1])
    source, _ = case.index()
    poisoned = {name: x.clone() for name, x in inputs.items()}
    if source is None:
        rows = torch.arange(slots.start, slots.stop, device=DEVICE)
    else:
        # Rows that no other segment reads.
        others = torch.cat([source[: slots.start], source[slots.stop :]])
        rows = source[slots][~torch.isin(source[slots], others)]
        assert len(rows)
    poisoned["x"][rows] = torch.nan
    if case.state:
        poisoned["state"][ill] = torch.nan
    made = results(convolve, case, poisoned)
    assert made["output"][slots].isnan().any()
    for name in ("output", "carried", "d_x", "d_state"):
        if name not in made:
            continue
        kept = torch.ones(len(made[name]), dtype=torch.bool, device=DEVICE)
        if name == "d_x" and source is not None:
            kept[source[slots]] = False
        else:
            kept[slots if len(kept) == case.num_slots else slice(ill, ill + 1)] = False
        assert torch.equal(made[name][kept], expected[name][kept]), name


@BOTH
def test_slots_past_the_last_border_are_not_read(case: Case) -> None:
    inputs, expected = clean(case)
    source, _ = case.index()
    spare = slice(case.num_slots - case.spare, None)
    # Rows that nothing reads but spare slots, or nothing at all.
    read = torch.arange(case.num_slots, device=DEVICE) if source is None else source
    unread = ~torch.isin(torch.arange(case.num_rows, device=DEVICE), read[: spare.start])
    assert unread.any()
    poisoned = inputs | {"x": torch.where(unread[:, None], torch.nan, inputs["x"])}
    made = results(convolve, case, poisoned, seed_of_spare=torch.nan)
    assert_same_bits(made, expected)
    assert not made["output"][spare].any() and not made["d_x"][unread].any()


@BOTH
def test_memory_is_written_before_it_is_read(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, expected = clean(case)

    def new_empty(self: Tensor, *sizes: Any, _new_empty: Any = Tensor.new_empty, **options: Any) -> Tensor:
        made = _new_empty(self, *sizes, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", new_empty)
    empty_like = SimpleNamespace(**vars(torch) | {"empty_like": lambda x: torch.full_like(x, torch.nan)})
    monkeypatch.setattr(carried_inputs, "torch", empty_like)
    assert_same_bits(results(convolve, case, inputs), expected)


def test_no_slot() -> None:
    for case in (Case((0,), channels=6, head=None), Case((0, 0), fan_out=2)):
        tensors = {name: x.requires_grad_() for name, x in draw(case).items()}
        output, carried = convolve(case, tensors)
        assert output.shape == (0, case.channels) and torch.equal(carried, tensors["state"])
        gradients = torch.autograd.grad(carried.sum() + output.sum(), list(tensors.values()))
        for name, gradient in zip(tensors, gradients, strict=True):
            assert torch.equal(gradient, torch.full_like(gradient, float(name == "state"))), name


def test_what_needs_no_gradient_gets_none() -> None:
    inputs = draw(INDEXED)
    expected = results(convolve, INDEXED, inputs)
    source, _ = INDEXED.index()
    tensors = inputs | {name: inputs[name].clone().requires_grad_() for name in ("weight", "bias")}
    output, _ = slot_conv(
        tensors["x"], tensors["weight"], tensors["bias"], INDEXED.cu_seqlens, source=source, state=tensors["state"],
        activation="silu", norm_heads=4, segment=segment_of_slots(INDEXED.cu_seqlens, INDEXED.num_slots),
    )  # fmt: skip
    assert torch.equal(output, expected["output"])
    generator = torch.Generator(DEVICE).manual_seed(1)
    seed = torch.randn(output.shape, generator=generator, device=DEVICE)
    gradients = torch.autograd.grad(output, [tensors["weight"], tensors["bias"]], seed)
    for gradient, name in zip(gradients, ("d_weight", "d_bias"), strict=True):
        # On a GPU this is another compilation, whose products and sums are fused otherwise.
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-5 if DEVICE == "cuda" else 0, atol=1e-5 if DEVICE == "cuda" else 0
        )


def arguments(case: Case, want_state: bool) -> tuple[Any, ...]:
    """Of the operator."""
    inputs = {name: x.requires_grad_() for name, x in draw(case).items()}
    segment = segment_of_slots(case.cu_seqlens, case.num_slots)
    return (
        inputs["x"], inputs["weight"], inputs.get("bias"), case.cu_seqlens, segment, *case.index(), inputs.get("state"),
        case.silu, case.head, want_state,
    )  # fmt: skip


@BOTH
def test_what_torch_asks_of_an_operator(case: Case) -> None:
    tests: tuple[str, ...] = ("test_schema", "test_faketensor")
    if case is INDEXED:
        tests += ("test_autograd_registration", "test_aot_dispatch_static")
    torch.library.opcheck(operator._slot_conv, arguments(case, want_state=case.carry), test_utils=tests)


@BOTH
def test_fake_tensors_have_the_shapes_of_real_ones(case: Case) -> None:
    (inputs, real), index = clean(case), case.index()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        tensors = {name: mode.from_tensor(x).requires_grad_() for name, x in inputs.items()}
        source, place = (None if x is None else mode.from_tensor(x) for x in index)
        output, carried = slot_conv(
            tensors["x"], tensors["weight"], tensors.get("bias"), case.cu_seqlens, source=source, place=place,
            state=tensors.get("state"), activation="silu", norm_heads=case.head, return_state=True,
        )  # fmt: skip
        assert carried is not None
        loss = output.sum() + (carried.sum() if carried.requires_grad else 0)
        gradients = torch.autograd.grad(loss, list(tensors.values()))
    fake = {"output": output, "carried": carried} | {f"d_{name}": x for name, x in zip(tensors, gradients, strict=True)}
    assert fake.keys() == real.keys()
    for name, x in fake.items():
        assert (x.shape, x.dtype, x.device, x.stride()) == (
            real[name].shape, real[name].dtype, real[name].device, real[name].stride(),
        ), name  # fmt: skip


@BOTH
def test_compiled_into_one_graph_it_is_the_same(case: Case) -> None:
    torch._dynamo.reset()
    (source, place), borders = case.index(), case.cu_seqlens

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        # Something of the compiler's own before it.
        return slot_conv(
            2 * tensors["x"], tensors["weight"], tensors.get("bias"), borders, source=source, place=place,
            state=tensors.get("state"), activation="silu", norm_heads=case.head, return_state=True,
        )  # fmt: skip

    inputs = draw(case)
    expected = results(lambda case, tensors: convolve(case, {**tensors, "x": 2 * tensors["x"]}), case, inputs)
    assert_same_bits(results(lambda case, tensors: compiled(dict(tensors)), case, inputs), expected)


BAD_INPUT: dict[str, tuple[Any, str]] = {
    "x": (lambda x: x[0], r"x must be \[S, C\], got shape \[8\]"),
    "x dtype": (lambda x: x.double(), "x must be of dtype float32, bfloat16, float16, got torch.float64"),
    "weight": (lambda x: x[1:], r"weight must be \[C, W\] = \[8, 4\], got shape \[7, 4\]"),
    "weight width": (lambda x: x.repeat(1, 3), "weight must have a W of 1 to 8, got 12"),
    "bias": (lambda x: x[1:], r"bias must be \[C\] = \[8\], got shape \[7\]"),
    "cu_seqlens": (lambda x: x[:1], "cu_seqlens must have the borders of a segment at least, got one border"),
    "cu_seqlens dtype": (lambda x: x.int(), "cu_seqlens must be of dtype int64, got torch.int32"),
    "source": (lambda x: x[:, None], r"source must be \[R\], got shape"),
    "source dtype": (lambda x: x.int(), "source must be of dtype int64, got torch.int32"),
    "place": (lambda x: x[1:], r"place must be \[S, F\] = \[14, 3\], got shape \[13, 3\]"),
    "place absence": (lambda x: None, "place must be given where x is read through a source and needs a gradient"),
    "segment": (lambda x: x[1:], r"segment must be \[R\] = \[37\], got shape \[36\]"),
    "segment dtype": (lambda x: x.long(), "segment must be of dtype int32, got torch.int64"),
    "state": (lambda x: x[1:], r"state must be \[N, W, C\] = \[8, 4, 8\], got shape \[7, 4, 8\]"),
    "activation": (lambda x: "relu", "activation must be None or \"silu\", got 'relu'"),
    "norm_heads": (lambda x: 3, "norm_heads must be a divisor of C = 8, at most 256, or None, got 3"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_named(case: str) -> None:
    change, message = BAD_INPUT[case]
    given = {name: x.requires_grad_() for name, x in draw(INDEXED).items()}
    given |= dict(zip(("source", "place"), INDEXED.index(), strict=True))
    segment = segment_of_slots(INDEXED.cu_seqlens, INDEXED.num_slots)
    given |= {"cu_seqlens": INDEXED.cu_seqlens, "segment": segment, "activation": None, "norm_heads": None}
    name = case.split()[0]
    with pytest.raises(ValueError, match=message):
        slot_conv(**given | {name: change(given[name])})


TAILS = replace(PLAIN, lengths=(4, 4, 4, 4), head=None)
BUGS = {
    "taps turned round": (
        PLAIN,
        Bug(kernels, "weight_ptr + channels * WIDTH + tap", "weight_ptr + channels * WIDTH + WIDTH - 1 - tap"),
    ),
    "a convolution across segments": (
        RAGGED,
        Bug(kernels, "own = inside & (earlier >= begin)", "own = inside & (earlier >= 0)"),
    ),
    "inputs of the segment before kept": (
        PLAIN,
        Bug(kernels, "            left = end - rows\n", "            left = end - rows + 9\n"),
    ),
    "a run begins without the inputs before it": (
        PLAIN,
        Bug(kernels, "own = inside & (earlier >= begin)", "own = inside & (earlier >= begin) & (begin == rows)"),
    ),
    "the state one row off": (
        RAGGED,
        Bug(kernels, "((segment + 1) * WIDTH + earlier - begin)", "((segment + 1) * WIDTH + earlier - begin - 1)"),
    ),
    "the state's rows and channels swapped": (
        RAGGED,
        Bug(kernels, "earlier - begin)[:, None] * CHANNELS + channels", "earlier - begin)[:, None] + WIDTH * channels"),
    ),
    "a strided row read as a dense one": (
        replace(RAGGED, apart=4),
        Bug(kernels, "rows[:, None] * x_stride + channels", "rows[:, None] * channels.shape[0] + channels"),
    ),
    "the index not used": (
        INDEXED,
        Bug(kernels, "rows = tl.load(source_ptr + rows, mask=valid, other=0)", "rows = rows // 3"),
    ),
    "bias past the last border": (RAGGED, Bug(kernels, "y = tl.where((rows < border)[:, None], y, 0.0)", "pass")),
    "a mask of channels dropped": (replace(PLAIN, channels=12, head=3), Bug(kernels, "(column < TILE) & ", "")),
    "a norm over the tile": (
        PLAIN,
        Bug(kernels, "return tile, block_of(tile), self.head", "return tile, block_of(tile), block_of(tile)"),
    ),
    "the norm's gradient forgotten": (PLAIN, Bug(kernels, "d = shrink * (d - y * (", "d = shrink * (d - 0 * y * (")),
    "the activation's gradient forgotten": (
        TAILS,
        Bug(kernels, "slope = sigmoid * (1.0 + z * (1.0 - sigmoid))", "slope = sigmoid"),
    ),
    "gradients across segments": (
        TAILS,
        Bug(kernels, "tl.maximum(begin, first)", "first"),
    ),
    "a segment's last gradients not stored": (
        TAILS,
        Bug(kernels, "stored = (left <= 0) & (", "stored = (left < 0) & ("),
    ),
    "gradients of the next run summed too": (PLAIN, Bug(kernels, "if step < LENGTH:", "if step < LENGTH + 1:")),
    "a run ends without the slots after it": (
        PLAIN,
        Bug(kernels, "range(LENGTH + LATE, num", "range(LENGTH + LATE - 1, num"),
    ),
    "taps of the gradient turned round": (
        PLAIN,
        Bug(kernels, "d_window[tap] + d * taps[tap]", "d_window[tap] + d * taps[LATE - 1 - tap]"),
    ),
    "the weight's gradient with its taps and channels changed over": (
        PLAIN,
        Bug(kernels, "d_weight_ptr + channel * WIDTH + tap", "d_weight_ptr + tap * CHANNELS + channel"),
    ),
    "the last runs left out of the sums": (
        PLAIN,
        Bug(kernels, "summed_rows(sums_ptr, num_runs,", "summed_rows(sums_ptr, num_runs // 2,"),
    ),
    "the weight's gradient one row off": (PLAIN, Bug(kernels, "sums[tap] + d * window[tap]", "sums[tap] + d * x")),
    "the new state's gradient lost": (RAGGED, Bug(kernels, "(rows >= end - WIDTH)", "(rows >= end - WIDTH + 1)")),
    "the carried inputs one slot early": (
        RAGGED,
        Bug(carried_inputs, "place = length - WIDTH + rows % WIDTH", "place = length - WIDTH - 1 + rows % WIDTH"),
    ),
    "the state's gradient one tap off": (
        RAGGED,
        Bug(carried_inputs, "taps[row - place - 1]", "taps[row - place - 1 - (row > place + 1)]"),
    ),
    "the old state's way into the new one lost": (
        RAGGED,
        Bug(carried_inputs, "kept = (row >= length)", "kept = (row > length)"),
    ),
    "a segment past the last slot asks too": (
        RAGGED,
        Bug(carried_inputs, "valid = place < length", "valid = place < length + 1"),
    ),
}


@in_the_interpreter
@pytest.mark.parametrize("bug", [None, *BUGS])
def test_seeded_bugs_are_caught(bug: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, seeded = (RAGGED, None) if bug is None else BUGS[bug]
    # Runs shorter than the segments.
    walk(monkeypatch, 8, 5)
    module = kernels if seeded is None else seeded.module
    copy = seed(module, seeded, tmp_path)
    if module is kernels:
        monkeypatch.setattr(copy, "walks_of", kernels.walks_of)
    monkeypatch.setattr(operator, "kernels" if module is kernels else "carried_inputs", copy)
    if bug is None:
        check(case)
        return
    with over_the_budget():
        check(case)


@pytest.mark.gpu
def test_many_segments() -> None:
    """More programs than a grid's second and third dimension hold."""
    lengths = tuple(torch.randint(0, 60, (200_000,)).tolist())
    case = Case(lengths, spare=9, dtype=torch.bfloat16)
    check(case)


@pytest.mark.gpu
def test_rows_past_the_int32_offsets() -> None:
    case = Case((40, 0, 30), spare=3, channels=256, head=64, dtype=torch.bfloat16, apart=2**16 - 256)
    inputs = draw(replace(case, apart=0))
    expected = results(convolve, replace(case, apart=0), inputs)
    rows = 2**31 // 2**16 + 100
    far = torch.zeros(rows, 2**16, device=DEVICE, dtype=torch.bfloat16)
    far[-case.num_rows :, :256] = inputs["x"]
    source = torch.arange(rows - case.num_rows, rows, device=DEVICE)
    output, _ = slot_conv(
        far[:, :256], inputs["weight"], inputs["bias"], case.cu_seqlens, source=source, state=inputs["state"],
        activation="silu", norm_heads=64,
    )  # fmt: skip
    assert torch.equal(output, expected["output"])


@pytest.mark.gpu
@BOTH
def test_nothing_waits_for_the_gpu_and_a_graph_gives_the_same(case: Case) -> None:
    # Made on the stream of the capture: a gradient is accumulated on the stream of its leaf.
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        inputs = {name: x.requires_grad_() for name, x in draw(case).items()}
    source, place = case.index()
    borders = case.cu_seqlens

    def both() -> list[Tensor]:
        output, _ = slot_conv(
            inputs["x"], inputs["weight"], inputs.get("bias"), borders, source=source, place=place,
            state=inputs.get("state"), activation="silu", norm_heads=case.head,
        )  # fmt: skip
        return [output, *torch.autograd.grad(output, list(inputs.values()), torch.ones_like(output))]

    with torch.cuda.stream(stream):
        expected = both()
    before = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        with torch.cuda.stream(stream):
            both()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        made = both()
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, made, expected))
