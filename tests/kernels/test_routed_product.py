"""Products with the matrices of routed slots against PyTorch in float64, and the bugs this must catch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from cases import DEVICE, DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st
from poison import poisoned_memory
from scan_laws import Patch, assert_same_bits
from seeding import Bug, in_the_interpreter, over_the_budget, seed
from torch import Tensor

from linear_moe.kernels import mixing, routed_product
from linear_moe.kernels.launch_tables import trying
from linear_moe.kernels.routed_product import TABLE, Launch
from linear_moe.layers.projections import Routes, project, routes_are_taken
from linear_moe.testing.budget import assert_within_budget

Inputs = Mapping[str, Tensor]

if DEVICE == "cpu":
    # The interpreter multiplies no tiles of 16 bits.
    DTYPES = [torch.float32]
SMALL = Launch(outputs=16, rows=16, depth=16, num_warps=4, num_stages=2)
"""With which a few numbers are several tiles."""
LENGTHS = (20, 0, 33, 1, 0)


def draw(
    lengths: tuple[int, ...] = LENGTHS, *, inputs: int = 24, outputs: int = 40, tokens: int = 30, pads: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:  # fmt: skip
    """Tokens, matrices, and slots of as many as `lengths` for each group; `pads` slots are of none."""
    torch.manual_seed(0)
    drawn = {
        "x": torch.randn(tokens, inputs).to(dtype),
        "source": torch.randint(tokens, (sum(lengths) + pads,)),
        "weight": torch.randn(len(lengths), outputs, inputs).to(dtype),
        "ends": torch.tensor(lengths).cumsum(0).to(torch.int32),
    }
    return {name: x.to(DEVICE) for name, x in drawn.items()}


def definition(inputs: Inputs) -> Tensor:
    """Of the rows that have a group."""
    borders = [0, *inputs["ends"].tolist()]
    rows = inputs["x"][inputs["source"]]
    groups = zip(itertools.pairwise(borders), inputs["weight"], strict=True)
    return torch.cat([rows[start:end] @ weight.t() for (start, end), weight in groups])


def kernel(inputs: Inputs) -> Tensor:
    return mixing.routed_product(inputs["x"], inputs["source"], inputs["weight"], inputs["ends"])


def check(inputs: Inputs) -> None:
    """The product is within the error budget."""
    wide = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    terms = {name: x.abs() if x.is_floating_point() else x for name, x in wide.items()}
    made = kernel(inputs)
    assert made.shape == (inputs["source"].shape[0], inputs["weight"].shape[1]) and made.dtype == inputs["x"].dtype
    assert_within_budget(
        {"product": made[: int(inputs["ends"][-1])]}, {"product": definition(inputs)}, {"product": definition(wide)},
        terms={"product": definition(terms)},
    )  # fmt: skip


@settings(max_examples=15 if DEVICE == "cpu" else 60)
@given(
    st.lists(st.sampled_from([0, 1, 2, 15, 16, 17, 40]), min_size=1, max_size=6),
    st.integers(1, 70),
    st.integers(1, 150),
    st.integers(0, 20),
    st.sampled_from(DTYPES),
)
def test_drawn_shapes_are_within_the_budget(
    lengths: list[int], inputs: int, outputs: int, pads: int, dtype: torch.dtype
) -> None:
    scale = 1 if DEVICE == "cpu" else 37
    drawn = tuple(scale * length for length in lengths)
    check(draw(drawn, inputs=scale * inputs, outputs=scale * outputs // 4 + 1, pads=pads, dtype=dtype))


@pytest.mark.parametrize("outputs", [15, 16, 17, 32, 40, 47, 48, 49, 56, 63])
def test_outputs_past_whole_tiles(outputs: int) -> None:
    with trying(TABLE, (torch.float32,), SMALL):
        check(draw(outputs=outputs))


@pytest.mark.parametrize("groups", [1, 2, 3, 8, 65])
def test_numbers_of_groups(groups: int) -> None:
    check(draw((*(3 * (group % 4) for group in range(groups - 1)), 50)))


def test_nothing_is_read_past_the_last_group() -> None:
    """Slots of no group name any token, and their rows are not looked at."""
    inputs = draw(pads=40)
    inputs["source"][54:] = 0
    inputs["x"][0], inputs["source"][:54] = torch.nan, inputs["source"][:54].clamp_min(1)
    check(inputs)


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
def test_no_slot(lengths: tuple[int, ...]) -> None:
    made = kernel(draw(lengths or (0,), tokens=1))
    assert made.shape == (0, 40)


def test_same_bits_twice_and_memory_is_written_before_it_is_read() -> None:
    inputs = draw()
    once = {"product": kernel(inputs)}
    assert_same_bits(once, {"product": kernel(inputs)})
    with poisoned_memory():
        assert_same_bits(once, {"product": kernel(inputs)})


def test_a_row_is_the_same_wherever_it_lies() -> None:
    inputs = draw((40,))
    moved = torch.randperm(40, device=DEVICE)
    assert torch.equal(kernel(inputs)[moved], kernel(inputs | {"source": inputs["source"][moved]}))


def test_what_torch_asks_of_an_operator() -> None:
    torch.library.opcheck(
        mixing.routed_product, tuple(draw().values()),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"),
    )  # fmt: skip


@pytest.mark.parametrize("outputs", [40, 37, 1284])
def test_the_layers_gradients_are_those_of_the_definition(outputs: int) -> None:
    """With what the tokens' other products send back; rows of the product need not be of 16 bytes."""
    lengths, tokens, fan_out = (12, 0, 28), 20, 2
    # On a GPU torch's grouped product takes no float32, in the interpreter nothing else is multiplied.
    dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16
    inputs = draw(lengths, tokens=tokens, outputs=outputs, dtype=dtype)
    assert routes_are_taken(inputs["x"], inputs["weight"])
    slots = torch.randperm(tokens * fan_out, device=DEVICE)
    inputs["source"] = slots // fan_out
    place = torch.empty_like(slots)
    place[slots] = torch.arange(len(slots), device=DEVICE)
    inputs |= {name: torch.randn(16, 24, device=DEVICE).to(dtype) for name in ("of_tokens", "of_gate")}
    seeds = [
        torch.randn(len(slots), outputs, device=DEVICE),
        *(torch.randn(tokens, 16, device=DEVICE) for _ in range(2)),
    ]
    names = ["x", "weight", "of_tokens", "of_gate"]

    def by_layer(x: Tensor, *weights: Tensor) -> list[Tensor | None]:
        return list(project(x, *weights, Routes(inputs["ends"], inputs["source"], place.view(tokens, fan_out))))

    def by_definition(x: Tensor, weight: Tensor, *others: Tensor) -> list[Tensor | None]:
        return [definition({**inputs, "x": x, "weight": weight}), *(x @ other.T for other in others)]

    def gradients(function: Callable[..., list[Tensor | None]], dtype: torch.dtype) -> dict[str, Tensor]:
        learned = [inputs[name].to(dtype).requires_grad_() for name in names]
        found = torch.autograd.grad(
            function(*learned), learned, [each.to(inputs["x"].dtype).to(dtype) for each in seeds]
        )
        return {f"d_{name}": x for name, x in zip(names, found, strict=True)}

    exact = gradients(by_definition, torch.float64)
    assert_within_budget(gradients(by_layer, dtype), gradients(by_definition, dtype), exact, dtype)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.skipif(
    DEVICE == "cuda", reason="torch's grouped product on a GPU takes no float32; the layers' tests have bfloat16"
)
def test_a_group_of_all_tokens_is_like_any_other(shared: bool) -> None:
    tokens = 20
    inputs = draw((12, 28, tokens), tokens=tokens)
    slots = torch.cat((torch.randperm(2 * tokens), 2 * tokens + torch.arange(tokens)))
    source = torch.cat((slots[: 2 * tokens] // 2, torch.arange(tokens)))
    place = torch.empty_like(slots)
    place[slots] = torch.arange(len(slots))
    place = torch.cat((place[: 2 * tokens].view(tokens, 2), place[2 * tokens :, None]), 1)
    x, weight = (inputs[name].requires_grad_() for name in ("x", "weight"))
    d_product = torch.randn(len(slots), 40)
    made = project(x, weight, None, None, Routes(inputs["ends"], source, place, shared))
    found = torch.autograd.grad(made.slots, (x, weight), d_product)
    exact = [each.detach().double().requires_grad_() for each in (x, weight)]
    expected = definition({**inputs, "x": exact[0], "weight": exact[1], "source": source})
    for one, other in zip(found, torch.autograd.grad(expected, exact, d_product.double()), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


BUGS = {
    "slots are taken for tokens": ("token = tl.load(source_ptr + row, mask=row < end, other=0)",
                                   "token = tl.where(row < end, row, 0) % 30"),
    "a program makes its first tile again": ("this + num_programs, source_ptr", "this, source_ptr"),
    "every group has the first one's matrix": ("weight_ptr + group.to(tl.int64)", "weight_ptr + 0 * group.to(tl.int64)"),
    "a group begins where the one before began": ("starts = tl.load(ends_ptr + groups - 1, mask=exists & (groups > 0)",
                                                  "starts = tl.load(ends_ptr + groups - 2, mask=exists & (groups > 1)"),
    "a group's last row is left out": ("exists = row < end", "exists = row < end - 1"),
    "the outputs past whole tiles are the first ones": ("last_at = matrix_ptr + last[None, :] * INPUTS",
                                                        "last_at = matrix_ptr + (last - WHOLE * COLUMNS)[None, :] * INPUTS"),
    "the outputs past whole tiles are forgotten": ("mask=exists[:, None] & (last < OUTPUTS)[None, :]",
                                                   "mask=exists[:, None] & (last < 0)[None, :]"),
    "inputs past whole steps are read from the next row": ("inside = (depth < INPUTS - at) | EVEN",
                                                           "inside = depth < DEPTH"),
    "the last row of tiles is left out": ("row_tiles = cdiv(rows, launch.rows) + groups",
                                          "row_tiles = cdiv(rows, launch.rows)"),
}  # fmt: skip
COUNTS = {"inputs past whole steps are read from the next row": 2}


@in_the_interpreter
@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_caught(bug: str, tmp_path: Path, monkeypatch: Patch) -> None:
    right, wrong = BUGS[bug]
    copy = seed(routed_product, Bug(routed_product, right, wrong, COUNTS.get(bug, 1)), tmp_path)
    monkeypatch.setattr(mixing, "_routed_product", copy)
    with over_the_budget(), trying(TABLE, (torch.float32,), SMALL):
        check(draw())


@in_the_interpreter
def test_a_copy_without_a_bug_keeps_the_budget(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(mixing, "_routed_product", seed(routed_product, None, tmp_path))
    with trying(TABLE, (torch.float32,), SMALL):
        check(draw())


@pytest.mark.gpu
def test_tensors_past_the_int32_offsets() -> None:
    rows, inputs, outputs = 2**21 + 300, 1024, 1032
    free, _ = torch.cuda.mem_get_info()
    if free < 2**34:
        pytest.skip(f"needs 16 GiB of GPU memory, {free / 2**30:.0f} are free")
    x = torch.randn(rows, inputs, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(2, outputs, inputs, device=DEVICE, dtype=torch.bfloat16)
    source = torch.arange(rows, device=DEVICE).flip(0)
    ends = torch.tensor([rows - 200, rows], device=DEVICE, dtype=torch.int32)
    made = mixing.routed_product(x, source, weight, ends)
    for group, some in enumerate((slice(rows - 300, rows - 200), slice(rows - 200, rows))):
        few = torch.tensor([100 if group == 0 else 0, some.stop - some.start], device=DEVICE, dtype=torch.int32)
        assert torch.equal(made[some], mixing.routed_product(x, source[some], weight, few))
