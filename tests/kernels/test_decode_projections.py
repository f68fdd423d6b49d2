"""The projections of one decoded token against products in float64, and the bugs that this must catch."""

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
from torch._subclasses.fake_tensor import FakeTensorMode

from linear_moe.kernels import decode_projections
from linear_moe.testing.budget import assert_within_budget

BY_SIZE = decode_projections.LAUNCHES
MOST = max(BY_SIZE)


@dataclass(frozen=True)
class Case:
    """A call, but for the numbers."""

    tokens: int
    fan_out: int = 2
    states: int = 4
    size: int = 20
    """Channels of x."""
    rows: tuple[int, int, int] = (18, 5, 0)
    """Of the matrix of a memory, of all tokens, and of the gate; 0 without it."""
    by_slot: bool = False
    bias: bool = False
    skewed: bool = False
    """Whether every token uses the same memories."""
    dtype: torch.dtype = torch.float32


def draw(case: Case) -> dict[str, Tensor]:
    """What is not there is left out."""
    S, F, M, size = case.tokens, case.fan_out, case.states, case.size
    order = torch.arange(M).expand(S, M) if case.skewed else torch.rand(S, M).argsort(1)
    inputs = {"x": torch.randn(S * F if case.by_slot else S, size)}
    memory_rows, token_rows, gate_rows = case.rows
    if memory_rows:
        inputs |= {"memory": order[:, :F].contiguous(), "memory_weight": torch.randn(M, memory_rows, size)}
    if case.bias:
        inputs["bias"] = torch.randn(M, memory_rows)
    if token_rows:
        inputs["token_weight"] = torch.randn(token_rows, size)
    if gate_rows:
        inputs["gate_weight"] = torch.randn(gate_rows, size)
    return {name: (x if name == "memory" else x.to(case.dtype)).to(DEVICE) for name, x in inputs.items()}


def kernels(module: Any, case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What was made, by name."""
    if case.by_slot:
        return {
            "memory": module.project_slots(inputs["x"], inputs["memory"], inputs["memory_weight"], inputs.get("bias"))
        }
    weights = [inputs.get(name) for name in ("memory", "memory_weight", "token_weight", "gate_weight")]
    made = module.project_token(inputs["x"], *weights)
    return {name: x for name, x in made._asdict().items() if x is not None}


def definition(case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same of whole matrices, in the dtype of the inputs."""
    made, x = {}, inputs["x"]
    if "memory" in inputs:
        slots = x if case.by_slot else x.repeat_interleave(case.fan_out, 0)
        own = inputs["memory_weight"][inputs["memory"].flatten()]
        made["memory"] = (own @ slots[..., None])[..., 0]
        if "bias" in inputs:
            made["memory"] = made["memory"] + inputs["bias"][inputs["memory"].flatten()]
    for name in ("token", "gate"):
        if f"{name}_weight" in inputs:
            made[name] = x @ inputs[f"{name}_weight"].T
    return made


def check(case: Case, module: Any = decode_projections) -> None:
    """Every product is within the error budget, and what no token asked for is not there."""
    inputs = draw(case)
    wide = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    # Sums of either sign, of which the rounding is that of what they are sums of.
    terms = definition(case, {name: x.abs() for name, x in wide.items()})
    assert_within_budget(
        kernels(module, case, inputs), definition(case, inputs), definition(case, wide), case.dtype, terms
    )


@settings(max_examples=12 if DEVICE == "cpu" else 100)
@given(data=st.data())
def test_drawn_shapes_are_within_the_budget(data: st.DataObject) -> None:
    small = DEVICE == "cpu"
    states = data.draw(st.integers(1, 5), label="M")
    sizes = st.integers(0, 40 if small else 300)
    rows = data.draw(st.tuples(sizes, sizes, sizes).filter(any), label="rows")
    by_slot = rows[0] > 0 and data.draw(st.booleans(), label="by slot")
    check(
        Case(
            data.draw(st.integers(0, 20 if small else 200), label="S"),
            fan_out=data.draw(st.integers(1, states), label="F"),
            states=states,
            size=data.draw(st.integers(1, 80 if small else 1100), label="I"),
            rows=(rows[0], 0, 0) if by_slot else rows,
            by_slot=by_slot,
            bias=by_slot and data.draw(st.booleans(), label="bias"),
            skewed=data.draw(st.booleans(), label="skewed"),
            dtype=data.draw(st.sampled_from(DTYPES), label="dtype"),
        )
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, *(size for most in BY_SIZE for size in (most, most + 1)), 2 * MOST + 2])
def test_every_launch_with_whole_and_cut_tiles(tokens: int, dtype: torch.dtype) -> None:
    launch = BY_SIZE[min((most for most in BY_SIZE if tokens <= most), default=MOST)]
    rows = (launch.rows + 1, launch.rows, 1)
    check(Case(tokens, fan_out=3, states=4, size=launch.width + 1, rows=rows, dtype=dtype))


@pytest.mark.parametrize("by_slot", [False, True])
def test_more_slots_of_one_memory_than_a_tile_takes(by_slot: bool) -> None:
    check(Case(2 * MOST + 3, states=6, rows=(3, 0, 0), size=5, skewed=True, by_slot=by_slot, bias=by_slot))


SOME = Case(5, fan_out=2, rows=(7, 6, 3))
BY_SLOT = Case(5, fan_out=3, rows=(7, 0, 0), by_slot=True, bias=True)
every_example = pytest.mark.parametrize("case", [SOME, BY_SLOT], ids=["by token", "by slot"])


def test_only_picked_memories_are_read() -> None:
    case = replace(SOME, skewed=True)
    inputs = draw(case)
    once = kernels(decode_projections, case, inputs)
    ill = inputs["memory_weight"].clone()
    ill[case.fan_out :] = torch.nan
    assert_same_bits(once, kernels(decode_projections, case, inputs | {"memory_weight": ill}))


def test_a_nan_stays_with_its_token() -> None:
    inputs = draw(SOME)
    ill = inputs["x"].clone()
    ill[2] = torch.nan
    once, made = (kernels(decode_projections, SOME, inputs | {"x": x}) for x in (inputs["x"], ill))
    for name, x in made.items():
        token = torch.arange(len(x), device=DEVICE) // (SOME.fan_out if name == "memory" else 1)
        assert torch.equal(x[token != 2], once[name][token != 2]), name
        assert x[token == 2].isnan().all(), name


@every_example
def test_same_bits_twice_and_everything_is_written(case: Case) -> None:
    inputs = draw(case)
    once = kernels(decode_projections, case, inputs)
    with poisoned_memory():
        assert_same_bits(once, kernels(decode_projections, case, inputs))
    apart = {name: torch.stack([x, x], -1)[..., 0] for name, x in inputs.items()}
    assert not any(x.is_contiguous() for x in apart.values())
    assert_same_bits(once, kernels(decode_projections, case, apart))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_wide_weights_are_rounded_to_the_dtype_asked_for(dtype: torch.dtype) -> None:
    """As under autocast."""
    inputs = draw(SOME)
    rounded = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    given = [inputs[name] for name in ("x", "memory", "memory_weight", "token_weight", "gate_weight")]
    made = decode_projections.project_token(*given, dtype=dtype)
    assert_same_bits(made._asdict(), kernels(decode_projections, SOME, rounded))
    assert all(x is not None and x.dtype == dtype for x in made)


@every_example
def test_what_torch_asks_of_an_operator(case: Case) -> None:
    inputs = draw(case)
    names = ("x", "memory", "memory_weight", "bias", "token_weight", "gate_weight")
    given = (*(inputs.get(name) for name in names), case.by_slot, torch.float32)
    torch.library.opcheck(decode_projections._project, given)


@every_example
def test_fake_tensors_have_the_shapes_of_real_ones(case: Case) -> None:
    inputs = draw(case)
    real = kernels(decode_projections, case, inputs)
    with FakeTensorMode() as mode:
        fake = kernels(decode_projections, case, {name: mode.from_tensor(x) for name, x in inputs.items()})
    assert {name: (x.shape, x.dtype) for name, x in fake.items()} == {
        name: (x.shape, x.dtype) for name, x in real.items()
    }


BAD = {
    "x": (lambda x: x[0], r"x must be \[S, I\], got shape \[20\]"),
    "x dtype": (lambda x: x.double(), "dtype must be float32, bfloat16 or float16, got torch.float64"),
    "memory": (lambda x: x[1:], r"memory must be \[S, F\] = \[5, 2\], got shape \[4, 2\]"),
    "memory dims": (lambda x: x[:, 0], r"memory must be \[S, F\] with F at least 1, got shape \[5\]"),
    "memory dtype": (lambda x: x.int(), "memory must be of dtype int64, got torch.int32"),
    "memory_weight": (lambda x: x[0], r"memory_weight must be \[M, O, I\] with I = 20, got shape \[7, 20\]"),
    "token_weight": (lambda x: x[:, 1:], r"token_weight must be \[O', I\] with I = 20, got shape \[6, 19\]"),
    "gate_weight": (lambda x: x[None], r"gate_weight must be \[O'', I\] with I = 20, got shape \[1, 3, 20\]"),
    "gate_weight dtype": (lambda x: x.half(), "the weights must be of one dtype, got torch.float16, torch.float32"),
    "gate_weight device": (lambda x: x.to("meta"), "gate_weight must be on the device of x, .*, got meta"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    change, message = BAD[case]
    inputs, name = draw(SOME), case.split()[0]
    with pytest.raises(ValueError, match=message):
        kernels(decode_projections, SOME, inputs | {name: change(inputs[name])})


def test_bad_input_by_slot_is_named() -> None:
    inputs = draw(BY_SLOT)
    for name, bad, message in (
        ("x", inputs["x"][1:], r"x must be \[S \* F, I\] = \[15, 20\], got shape \[14, 20\]"),
        ("memory_weight", inputs["memory_weight"][0], r"weight must be \[M, O, I\] with I = 20, got shape \[7, 20\]"),
        ("bias", inputs["bias"][1:], r"bias must be \[M, O\] = \[4, 7\], got shape \[3, 7\]"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels(decode_projections, BY_SLOT, inputs | {name: bad})
    with pytest.raises(ValueError, match="memory and memory_weight must be given together"):
        decode_projections.project_token(inputs["x"], None, inputs["memory_weight"])
    with pytest.raises(ValueError, match="the weights must be of one dtype, got no weight"):
        decode_projections.project_token(inputs["x"], None, None)


WIDE = replace(SOME, size=BY_SIZE[16].width + 3)
MANY = Case(MOST + 2, states=3, rows=(3, 0, 0), size=5, skewed=True)
TALL = replace(SOME, rows=(BY_SIZE[16].rows + 1, BY_SIZE[16].rows + 1, BY_SIZE[16].rows + 1))
# None of them reads or writes out of bounds: what stands there is a matter of luck.
BUGS: dict[str, tuple[Case, dict[str, str]]] = {
    "the first memory's matrix is every memory's": (SOME, {"weight_ptr += state.to(tl.int64) * (MEMORY_ROWS * SIZE)": "pass"}),
    "slots are taken for tokens": (SOME, {"source = target // FAN_OUT": "source = target % num_tokens"}),
    "tokens are taken for slots": (BY_SLOT, {"source = target\n            e": "source = target // FAN_OUT\n            e"}),
    "a slot's place counts itself": (SOME, {"tl.cumsum(uses, 0) - uses": "tl.cumsum(uses, 0)"}),
    "what came before counts twice": (MANY, {"place = count + tl": "place = 2 * count + tl"}),
    "every tile is the first": (MANY, {"rank = first + tl": "rank = tl"}),
    "the last channels are left out": (WIDE, {"range(0, SIZE, WIDTH)": "range(0, SIZE - WIDTH, WIDTH)"}),
    "one row too few": (SOME, {"in_matrix = row < num_rows": "in_matrix = row < num_rows - 1"}),
    "every tile is the matrix's first": (TALL, {"row = tile * ROWS + tl": "row = tl"}),
    "the gate's tiles count on": (TALL, {"        tile -= TOKEN_TILES\n": ""}),
    "a token's bias is the first memory's": (BY_SLOT, {"memory_bias_ptr + state * MEMORY_ROWS": "memory_bias_ptr"}),
    "a sum of the last step alone": (WIDE, {"acc=product, ": ""}),
}  # fmt: skip


@in_the_interpreter
@pytest.mark.parametrize("bug", [None, *BUGS])
def test_seeded_bugs_are_caught(bug: str | None, tmp_path: Path) -> None:
    case, texts = (SOME, {}) if bug is None else BUGS[bug]
    module = seed_operator(decode_projections, texts, tmp_path)
    if bug is None:
        check(case, module)
        return
    with over_the_budget():
        check(case, module)
