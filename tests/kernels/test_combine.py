"""What a token reads, and its gradients, against PyTorch in float64, and the bugs that this must catch."""

from __future__ import annotations

import warnings
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
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn import functional

from linear_moe.kernels import blocks, combine, mixing
from linear_moe.layers.norms import GatedRMSNorm
from linear_moe.layers.routing import SlotPlan
from linear_moe.layers.slots import scatter_slots
from linear_moe.testing.budget import assert_within_budget


@dataclass(frozen=True)
class Case:
    """A call, but for the numbers."""

    tokens: int
    fan_out: int = 2
    heads: int = 2
    V: int = 6
    weighted: bool = True
    pads: bool = True
    """Whether some tokens are pads, the first among them."""
    size: float = 1.0
    """Of the reads."""
    gate_size: float = 1.0
    dtype: torch.dtype = torch.float32
    """Of the reads."""
    gate_dtype: torch.dtype = torch.float32
    norm_dtype: torch.dtype = torch.float32
    eps: float = 1e-5


Inputs = Mapping[str, Tensor]
LEARNED = ("reads", "weights", "gate", "norm_weight")


def draw(case: Case) -> dict[str, Tensor]:
    """Inputs, and the gradient of the output."""
    S, F, H, V = case.tokens, case.fan_out, case.heads, case.V
    inputs = {
        "reads": (case.size * torch.randn(S * F, H, V)).to(case.dtype),
        "gate": (case.gate_size * torch.randn(S, H * V)).to(case.gate_dtype),
        "norm_weight": torch.randn(V).to(case.norm_dtype),
        "place": torch.randperm(S * F),
        "d_output": torch.randn(S, H * V).to(case.gate_dtype),
    }
    if case.weighted:
        inputs["weights"] = torch.rand(S, F)
    if case.pads:
        inputs["valid"] = (torch.rand(S) < 0.7) & (torch.arange(S) > 0)
    return {name: x.to(DEVICE) for name, x in inputs.items()}


def definition(inputs: Inputs, eps: float) -> Tensor:
    """As the layers have it."""
    (tokens, width), (_, heads, V) = inputs["gate"].shape, inputs["reads"].shape
    place, weights, valid = inputs["place"], inputs.get("weights"), inputs.get("valid")
    reads = inputs["reads"].to(torch.promote_types(inputs["reads"].dtype, torch.float32))
    each = scatter_slots(reads, SlotPlan(place, place, place), place.numel() // tokens)
    mixed = each.sum(1) if weights is None else (weights[..., None, None] * each).sum(1)
    gate = inputs["gate"].unflatten(-1, (heads, V))
    norm = GatedRMSNorm(heads, V, eps)
    given = (mixed, gate, gate.dtype)
    output: Tensor = functional_call(norm, {"weight": inputs["norm_weight"]}, given).reshape(tokens, width)
    return output if valid is None else torch.where(valid[:, None], output, 0)


def kernels(inputs: Inputs, eps: float) -> Tensor:
    """The kernels."""
    return mixing.combine_reads(
        inputs["reads"], inputs["place"], inputs.get("weights"), inputs["gate"], inputs["norm_weight"], eps=eps,
        valid=inputs.get("valid"),
    )  # fmt: skip


def results(run: Any, case: Case, inputs: Inputs, wide: bool = False) -> dict[str, Tensor]:
    """What `run` makes of the inputs, in float64 if `wide`, and its gradients, `d_` before their names."""
    tensors = {name: x.double() if wide and x.is_floating_point() else x for name, x in inputs.items()}
    learned = {name: tensors[name].detach().requires_grad_() for name in LEARNED if name in tensors}
    output = run(tensors | learned, case.eps)
    gradients = torch.autograd.grad(output, list(learned.values()), tensors["d_output"])
    return {"output": output.detach()} | dict(zip([f"d_{name}" for name in learned], gradients, strict=True))


def terms(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """What the results are sums and differences of, each number without its sign: the norm takes out what lies along x."""
    wide = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    S, F, H, V = case.tokens, case.fan_out, case.heads, case.V
    reads = wide["reads"][wide["place"]].reshape(S, F, H, V)
    weights = wide.get("weights", torch.ones(S, F, dtype=torch.float64, device=DEVICE))[..., None, None]
    factor = torch.rsqrt((weights * reads).sum(1).square().mean(-1, keepdim=True) + case.eps)
    normed = factor * (weights * reads).abs().sum(1)
    gate, d_output = (wide[name].reshape(S, H, V) for name in ("gate", "d_output"))
    gated, norm_weight, opened = (
        (d_output * functional.silu(gate)).abs(),
        wide["norm_weight"].abs(),
        torch.sigmoid(gate),
    )
    d_normed = gated * norm_weight
    d_mixed = (factor * (d_normed + normed * (d_normed * normed).mean(-1, keepdim=True)))[:, None]
    return {
        "output": normed * norm_weight * functional.silu(gate).abs(),
        "d_reads": weights * d_mixed,
        "d_weights": (d_mixed * reads.abs()).sum((-1, -2)),
        "d_gate": d_output.abs() * normed * norm_weight * opened * (1 + gate.abs() * (1 - opened)),
        "d_norm_weight": (gated * normed).sum((0, 1)),
    }


def check(case: Case, inputs: Inputs | None = None) -> None:
    """Outputs and gradients are within the error budget."""
    inputs = draw(case) if inputs is None else inputs
    assert_within_budget(
        results(kernels, case, inputs), results(definition, case, inputs), results(definition, case, inputs, wide=True),
        terms=terms(case, inputs),
    )  # fmt: skip


@st.composite
def cases(draw: st.DrawFn) -> Case:
    small = DEVICE == "cpu"
    return Case(
        tokens=draw(st.integers(1, 10 if small else 500)),
        fan_out=draw(st.integers(1, 5)),
        heads=draw(st.integers(1, 5)),
        V=draw(st.integers(1, 40 if small else 256)),
        weighted=draw(st.booleans()),
        pads=draw(st.booleans()),
        size=draw(st.sampled_from([1e-3, 1.0, 30.0])),
        gate_size=draw(st.sampled_from([1.0, 30.0])),
        dtype=draw(st.sampled_from(DTYPES)),
        gate_dtype=draw(st.sampled_from(DTYPES)),
        norm_dtype=draw(st.sampled_from(DTYPES)),
        eps=draw(st.sampled_from([1e-5, 1e-2])),
    )


@settings(max_examples=12 if DEVICE == "cpu" else 200)
@given(cases())
def test_drawn_shapes_are_within_the_budget(case: Case) -> None:
    check(case)


@pytest.mark.parametrize(
    "case",
    [
        Case(3, fan_out=3, heads=4, V=256),
        Case(9, heads=17, V=1),
        Case(9, fan_out=1, heads=1, V=1, weighted=False),
        Case(2, fan_out=9, heads=1, V=100),
        Case(combine.LAUNCH.tokens, pads=False),
        Case(2 * combine.LAUNCH.tokens + 1, pads=False),
    ],
    ids=str,
)
def test_sizes(case: Case) -> None:
    check(case)


def test_no_token() -> None:
    made = results(kernels, Case(0), draw(Case(0)))
    assert made["output"].shape == (0, 12) and made["d_reads"].shape == (0, 2, 6) and made["d_weights"].shape == (0, 2)
    assert not made["d_norm_weight"].any()


PADDED = Case(combine.LAUNCH.tokens + 3, fan_out=3, heads=3, V=5)
EXAMPLES = {"padded": PADDED, "unweighted": replace(PADDED, pads=False, weighted=False)}
every_example = pytest.mark.parametrize("case", EXAMPLES.values(), ids=EXAMPLES)


def of_pads(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Which tokens are pads, and where their slots lie."""
    pad = ~inputs["valid"]
    return pad, inputs["place"].reshape(-1, case.fan_out)[pad].flatten()


def test_pads_are_not_read_and_give_nothing() -> None:
    inputs = draw(PADDED)
    pad, places = of_pads(PADDED, inputs)
    expected = results(kernels, PADDED, inputs)
    ill = {name: x.clone() for name, x in inputs.items()}
    for name in ("gate", "weights", "d_output"):
        ill[name][pad] = torch.nan
    ill["reads"][places] = torch.nan
    made = results(kernels, PADDED, ill)
    assert_same_bits(expected, made)
    assert not made["d_reads"][places].any()
    for name in ("output", "d_gate", "d_weights"):
        assert not made[name][pad].any() and made[name][~pad].any(), name


def test_pads_without_an_epsilon() -> None:
    """Nothing of a pad is read, and the root of nothing has no inverse."""
    case = replace(PADDED, eps=0.0)
    inputs = draw(case)
    pad, places = of_pads(case, inputs)
    with warnings.catch_warnings():
        # numpy, which the interpreter is, warns of dividing by zero.
        warnings.simplefilter("ignore", RuntimeWarning)
        made = results(kernels, case, inputs)
    assert all(x.isfinite().all() for x in made.values())
    assert not made["output"][pad].any() and not made["d_reads"][places].any()


def test_a_nan_stays_with_its_token() -> None:
    case = replace(PADDED, pads=False)
    inputs = draw(case)
    expected = results(kernels, case, inputs)
    ill, token = {name: x.clone() for name, x in inputs.items()}, 4
    ill["reads"][inputs["place"][token * case.fan_out]] = torch.nan
    made = results(kernels, case, ill)
    assert made["output"][token].isnan().all() and made["d_norm_weight"].isnan().all()
    others = torch.arange(case.tokens, device=DEVICE) != token
    for name in ("output", "d_gate", "d_weights"):
        assert torch.equal(made[name][others], expected[name][others]), name
    places = inputs["place"].reshape(-1, case.fan_out)[others].flatten()
    assert torch.equal(made["d_reads"][places], expected["d_reads"][places])


@every_example
def test_where_a_slot_lies_changes_nothing(case: Case) -> None:
    inputs = draw(case)
    moved = torch.randperm(inputs["place"].numel(), device=DEVICE)
    reads = torch.empty_like(inputs["reads"])
    reads[moved] = inputs["reads"]
    one = results(kernels, case, inputs)
    other = results(kernels, case, inputs | {"reads": reads, "place": moved[inputs["place"]]})
    assert_same_bits(one, other | {"d_reads": other["d_reads"][moved]})


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


def test_a_loss_that_sees_one_number_gives_an_expanded_gradient() -> None:
    inputs = draw(PADDED)
    gate = inputs["gate"].clone().requires_grad_()
    kernels(inputs | {"gate": gate}, 1e-5).sum().backward()
    ones = results(kernels, PADDED, inputs | {"d_output": torch.ones_like(gate)})
    assert torch.equal(gate.grad, ones["d_gate"])


@every_example
def test_what_torch_asks_of_an_operator(case: Case) -> None:
    inputs = draw(replace(case, tokens=2))
    for name in LEARNED:
        if name in inputs:
            inputs[name].requires_grad_()
    names = ("reads", "place", "weights", "gate", "norm_weight", "valid")
    torch.library.opcheck(
        mixing._combine,
        (*(inputs.get(name) for name in names), 1e-5),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static"),
    )


@every_example
def test_fake_tensors_have_the_shapes_of_real_ones(case: Case) -> None:
    case = replace(case, dtype=DTYPES[-1])
    inputs = draw(case)
    real = results(kernels, case, inputs)
    with FakeTensorMode() as mode:
        fake = results(kernels, case, {name: mode.from_tensor(x) for name, x in inputs.items()})
    assert fake.keys() == real.keys()
    for name, x in fake.items():
        assert (x.shape, x.dtype, x.device) == (real[name].shape, real[name].dtype, real[name].device), name
        assert x.is_contiguous() and real[name].is_contiguous(), name


@every_example
def test_compiled_into_one_graph_it_is_the_same(case: Case) -> None:
    case = replace(case, tokens=3)
    inputs = draw(case)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(tensors: dict[str, Tensor]) -> Tensor:
        # Something of the compiler's own before and after.
        return kernels({**tensors, "gate": 2 * tensors["gate"]}, 1e-5) + 1

    def eager(tensors: Inputs, eps: float) -> Tensor:
        return kernels({**tensors, "gate": 2 * tensors["gate"]}, eps) + 1

    assert_same_bits(results(eager, case, inputs), results(lambda tensors, eps: compiled(dict(tensors)), case, inputs))


BAD = {
    "reads": (lambda x: x[0], r"reads must be \[R, H, V\] with V from 1 to 256, got shape \[2, 6\]"),
    "reads V": (lambda x: x.new_zeros(8, 2, 257), r"reads must be \[R, H, V\] with V from 1 to 256, got shape \[8, 2, 257\]"),
    "reads rows": (lambda x: x[1:], "reads must have a row for each of F slots of the gate's 4 tokens, got 7"),
    "reads none": (lambda x: x[:0], "reads must have a row for each of F slots of the gate's 4 tokens, got 0"),
    "reads dtype": (lambda x: x.double(), "reads must be of dtype float32, bfloat16, float16, got torch.float64"),
    "place": (lambda x: x[:, None], r"place must be \[R\] = \[8\], got shape \[8, 1\]"),
    "place dtype": (lambda x: x.int(), "place must be of dtype int64, got torch.int32"),
    "weights": (lambda x: x[:, 1:], r"weights must be \[S, F\] = \[4, 2\], got shape \[4, 1\]"),
    "weights dtype": (lambda x: x.half(), "weights must be of dtype float32, got torch.float16"),
    "gate": (lambda x: x[:, 1:], r"gate must be \[S, H \* V\] = \[4, 12\], got shape \[4, 11\]"),
    "gate device": (lambda x: x.to("meta"), "gate must be on the device .*, got meta"),
    "norm_weight": (lambda x: x[1:], r"norm_weight must be \[V\] = \[6\], got shape \[5\]"),
    "valid": (lambda x: x[1:], r"valid must be \[S\] = \[4\], got shape \[3\]"),
    "valid dtype": (lambda x: x.float(), "valid must be of dtype bool, got torch.float32"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    change, message = BAD[case]
    inputs, name = draw(Case(4)), case.split()[0]
    with pytest.raises(ValueError, match=message):
        kernels(inputs | {name: change(inputs[name])}, 1e-5)


FEW = replace(PADDED, tokens=5)
FAINT = replace(FEW, size=1e-3)
BUGS = {
    "pads are read": (FEW, Bug(combine, "(valid_ptr + token) != 0, HEADS, 0)", "(valid_ptr + token) != 0, HEADS, HEADS)")),
    "the first slot's weight is every slot's": (
        FEW, Bug(combine, "_weight_of(weights_ptr, first_slot + f) * read", "_weight_of(weights_ptr, first_slot) * read"),
    ),
    "slots are taken as they come": (
        FEW, Bug(combine, "tl.load(place_ptr + first_slot + f) * SIZE", "(first_slot + f) * SIZE"),
    ),
    "the mean is of the whole tile": (FEW, Bug(combine, "tl.sum(x * x, 1) / V", "tl.sum(x * x, 1) / COLUMNS")),
    "the epsilon is forgotten": (FAINT, Bug(combine, "x * x, 1) / V + eps)", "x * x, 1) / V + 1e-12)")),
    "the gate is no product with itself": (FEW, Bug(combine, "(z * sigmoids(z)[0])", "sigmoids(z)[0]")),
    "open is shut": (FEW, Bug(blocks, "tl.where(z >= 0, larger, smaller),", "tl.where(z >= 0, smaller, larger),")),
    "the gate's slope is its value": (FEW, Bug(combine, "(up * (1.0 + z * down))", "up")),
    "a gradient's weight is forgotten": (FEW, Bug(combine, "_weight_of(weights_ptr, first_slot + f) * d_x", "1.0 * d_x")),
    "the norm is taken as a constant": (FEW, Bug(combine, "d_normed - normed * along[:, None]", "d_normed")),
    "the norm's weight has no part in a gradient": (FEW, Bug(combine, "gated * norm_weight[None, :]", "gated")),
    "the last token's part of the norm's gradient": (FEW, Bug(combine, "d_norm += ", "d_norm = ")),
    "a weight's gradient is its neighbour's": (FEW, Bug(combine, "tl.where(slot == f,", "tl.where(slot == SLOTS - 1 - f,")),
    "the last token of a program is left out": (PADDED, Bug(combine, "first_token, TOKENS)", "first_token, TOKENS - 1)")),
    "a gradient goes to the first slot": (
        FEW, Bug(combine, "            place = tl.load(place_ptr + first_slot + f)\n            d_read",
                    "            place = tl.load(place_ptr + first_slot)\n            d_read"),
    ),
}  # fmt: skip


@in_the_interpreter
@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_caught(bug: str, tmp_path: Path, monkeypatch: Patch) -> None:
    case, seeded = BUGS[bug]
    monkeypatch.setattr(mixing, "combine", seed(combine, seeded, tmp_path))
    with over_the_budget():
        check(case)


@in_the_interpreter
@pytest.mark.parametrize("case", [PADDED, FAINT], ids=["padded", "faint"])
def test_a_copy_without_a_bug_keeps_the_budget(case: Case, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(mixing, "combine", seed(combine, None, tmp_path))
    check(case)


def part(case: Case, inputs: Inputs, tokens: slice) -> dict[str, Tensor]:
    """Some tokens alone, with the reads at their places."""
    places = inputs["place"].reshape(-1, case.fan_out)[tokens].flatten()
    some = {
        name: x if name == "norm_weight" else x[tokens] for name, x in inputs.items() if name not in ("reads", "place")
    }
    return some | {"reads": inputs["reads"][places], "place": torch.arange(places.numel(), device=DEVICE)}


def assert_alone_as_among_others(case: Case, inputs: Inputs, tokens: slice) -> None:
    together = results(kernels, case, inputs)
    alone = results(kernels, case, part(case, inputs, tokens))
    places = inputs["place"].reshape(-1, case.fan_out)[tokens].flatten()
    assert torch.equal(together["d_reads"][places], alone["d_reads"])
    for name in ("output", "d_gate", "d_weights"):
        assert torch.equal(together[name][tokens], alone[name]), name


@pytest.mark.gpu
def test_more_programs_than_other_grid_dimensions_hold() -> None:
    case = Case(600_000, heads=1, V=8)
    assert_alone_as_among_others(case, draw(case), slice(case.tokens - 100, None))


@pytest.mark.gpu
def test_tensors_past_the_int32_offsets() -> None:
    case = Case(2**20 + 8, fan_out=2, heads=4, V=256, pads=False, dtype=torch.bfloat16, gate_dtype=torch.bfloat16)
    free, _ = torch.cuda.mem_get_info()
    if free < 2**31 * 12:
        pytest.skip(f"needs {2**31 * 12 / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} are free")
    shape = (case.tokens, case.heads * case.V)
    inputs = {
        "reads": torch.randn(2 * case.tokens, case.heads, case.V, device=DEVICE, dtype=case.dtype),
        "gate": torch.randn(shape, device=DEVICE, dtype=case.dtype),
        "d_output": torch.randn(shape, device=DEVICE, dtype=case.dtype),
        "norm_weight": torch.randn(case.V, device=DEVICE),
        "weights": torch.rand(case.tokens, 2, device=DEVICE),
        # The last token's reads are the last.
        "place": torch.arange(2 * case.tokens, device=DEVICE),
    }
    assert_alone_as_among_others(case, inputs, slice(case.tokens - 16, None))


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu_and_a_captured_graph_gives_the_same_numbers() -> None:
    case = Case(3000, fan_out=3, heads=4, V=64, dtype=torch.bfloat16, gate_dtype=torch.bfloat16)
    inputs = draw(case)
    results(kernels, case, inputs)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(kernels, case, inputs)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results(kernels, case, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(kernels, case, inputs)
    for name, x in draw(case).items():
        inputs[name].copy_(x)
    graph.replay()
    replayed = {name: x.clone() for name, x in captured.items()}
    assert_same_bits(replayed, results(kernels, case, inputs))
