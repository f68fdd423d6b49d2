"""The kernels as torch operators, and as implementations of the ops."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import (
    DELTA_FORMS,
    DEVICE,
    DTYPES,
    FORMS,
    SCALAR_FORMS,
    VECTOR_FORMS,
    Case,
    check,
    draw,
    kernels,
    module_of,
    results,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from linear_moe import ops
from linear_moe.forms import Decay, Recurrence
from linear_moe.kernels import gated_deltanet, join, library
from linear_moe.ops import RuleOutput
from linear_moe.testing.budget import assert_within_budget

FAMILIES = {"scalar_scan": SCALAR_FORMS[-1], "gated_deltanet": DELTA_FORMS[-1], "gla": VECTOR_FORMS[-1]}
every_family = pytest.mark.parametrize("form", FAMILIES.values(), ids=FAMILIES)


def small(form: Recurrence, **changes: Any) -> Case:
    return replace(Case(form, (7, 0, 12), 2, 1, K=4, V=6, spare=1), **changes)


def split(form: Recurrence) -> Case:
    """Long enough to be split, even on a GPU."""
    return Case(form, (600 if DEVICE == "cuda" else 202, 1), K=4, V=6, rate=0.1)


def in_full(form: Recurrence) -> Case:
    """Whole chunks and whole blocks of a state: gradients take the memory of what they are made of."""
    return Case(form, (64, 64), K=32, V=64, dense=True, tight=True)


def arguments(case: Case) -> tuple[Any, ...]:
    """Of the form's operator, its tensors asking for gradients where there are any."""
    inputs = draw(case)
    decay = inputs.get("log_decay")
    for name, x in inputs.items():
        x.requires_grad_(name != "log_decay" or case.form.decay is not Decay.HEAD)
    rest = (case.cu_seqlens, case.max_length, case.dense, case.K**-0.5, case.final)
    qkv, state = (inputs["q"], inputs["k"], inputs["v"]), inputs.get("initial_state")
    if "beta" in inputs:
        return (*qkv, decay, inputs["beta"], state, *rest, case.form.decay.value, True)
    if case.form.decay is Decay.VECTOR:
        return (*qkv, decay, state, *rest, True)
    return (*qkv, decay, state, *rest, case.form.decay.value, True)


OPERATORS = {"scalar_scan": library._scalar, "gated_deltanet": library._delta, "gla": library._vector}
TESTS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")


@pytest.fixture
def _kept_is_comparable(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept for the backward pass is compared too: of a state past its K and V, of chunks and pieces past the last, and
    of pieces that are not joined, it would be nothing in particular."""
    for made in ("new_folded_states", "new_states"):
        new = getattr(gated_deltanet, made)
        monkeypatch.setattr(gated_deltanet, made, lambda *given, new=new: new(*given).zero_())
    monkeypatch.setattr(join, "_new_starts", torch.zeros_like)


@pytest.mark.usefixtures("_kept_is_comparable")
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("make", [small, split, in_full], ids=["whole", "split", "in full"])
def test_what_torch_asks_of_an_operator(make: Callable[[Recurrence], Case], name: str) -> None:
    # Of spare tokens, too, what is kept would be nothing in particular.
    case = replace(make(FAMILIES[name]), spare=0)
    torch.library.opcheck(OPERATORS[name], arguments(case), test_utils=TESTS)


@pytest.mark.usefixtures("_kept_is_comparable")
@pytest.mark.parametrize("form", DELTA_FORMS, ids=str)
def test_what_torch_asks_where_strengths_are_bfloat16(form: Recurrence) -> None:
    *first, beta, state, cu_seqlens, length, dense, scale, final, decay, _ = arguments(small(form, spare=0))
    given = (*first, beta.detach().bfloat16().requires_grad_(), state, cu_seqlens, length, dense, scale, final, decay)
    torch.library.opcheck(library._delta, (*given, True), test_utils=TESTS)
    # Nothing is kept, and nothing learns.
    plain = (x.detach() if isinstance(x, Tensor) else x for x in given)
    torch.library.opcheck(library._delta, (*plain, False), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("form", DELTA_FORMS, ids=str)
def test_strengths_of_another_dtype_are_the_float32_numbers_that_they_are(form: Recurrence, dtype: torch.dtype) -> None:
    """Their gradients are those of the float32 numbers, in their own dtype."""
    case = small(form)
    inputs = draw(case)
    beta = inputs["beta"].to(dtype)

    def gradients(beta: Tensor) -> list[Tensor]:
        learned = {name: x.detach().requires_grad_() for name, x in (inputs | {"beta": beta}).items()}
        made = kernels(case, learned)
        seeds = [torch.linspace(-1, 1, x.numel(), device=DEVICE).view_as(x) for x in made]
        return [*made, *torch.autograd.grad(made, list(learned.values()), seeds)]

    for one, other in zip(gradients(beta), gradients(beta.float()), strict=True):
        assert torch.equal(one, other.to(one.dtype))
    with torch.no_grad():
        alone = [kernels(case, inputs | {"beta": x}) for x in (beta, beta.float())]
    for one, other in zip(*alone, strict=True):
        assert torch.equal(one, other)


def test_strengths_of_another_dtype_are_compiled_ahead_too(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: list[object] = []
    monkeypatch.setattr(library, "compile_ahead", lambda device, kind, passes: kinds.append(kind))
    case = small(DELTA_FORMS[-1])
    inputs = draw(case)
    for dtype in (torch.float32, torch.bfloat16, torch.bfloat16):
        kernels(case, inputs | {"beta": inputs["beta"].to(dtype)})
    assert kinds[0] != kinds[1] == kinds[2]


def test_what_makes_the_gradient_of_strengths_makes_it_in_their_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd would round it, but a trace has it as it is."""
    backward, made = library._delta_backward, []
    monkeypatch.setattr(library, "_delta_backward", lambda *given: made.append(backward(*given)) or made[-1])
    case = small(DELTA_FORMS[0])
    inputs = draw(case)
    inputs["beta"] = inputs["beta"].bfloat16().requires_grad_()
    kernels(case, inputs)[0].sum().backward()
    ((_, _, _, _, d_beta, _),) = made
    assert d_beta.dtype == torch.bfloat16
    assert torch.equal(d_beta, inputs["beta"].grad)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_without_an_initial_or_a_final_state(form: Recurrence) -> None:
    case = small(form, initial=False, final=False, spare=0, dense=True)
    name = module_of(form).__name__.rpartition(".")[2]
    torch.library.opcheck(OPERATORS[name], arguments(case), test_utils=("test_schema", "test_faketensor"))


@every_family
def test_torchs_default_dtype_changes_nothing(form: Recurrence) -> None:
    case = split(form)
    inputs = draw(case)
    expected = results(kernels, case, inputs)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        made = results(kernels, case, inputs)
    finally:
        torch.set_default_dtype(default)
    assert {name: x.dtype for name, x in made.items()} == {name: x.dtype for name, x in expected.items()}
    # The loss's own numbers are drawn in the default dtype: only what comes before it is the same.
    for name in ("output", "final_state"):
        assert torch.equal(made[name], expected[name]), name


@every_family
@pytest.mark.parametrize("make", [small, split], ids=["whole", "split"])
def test_fake_tensors_have_the_shapes_of_real_ones(make: Callable[[Recurrence], Case], form: Recurrence) -> None:
    case = make(form)
    inputs = draw(case)
    real = results(kernels, case, inputs)
    borders = case.cu_seqlens
    with FakeTensorMode() as mode:
        # A case makes its borders anew: there is nothing in them to fake.
        fake_inputs = {name: mode.from_tensor(x) for name, x in inputs.items()}
        tensors = {name: x.requires_grad_() for name, x in fake_inputs.items()}
        output, final_state = library.scan(
            **{"log_decay": None, "beta": None} | tensors, decay=form.decay, scale=0.5, cu_seqlens=mode.from_tensor(borders),
            max_length=case.max_length, dense=case.dense, return_final_state=True,
        )  # fmt: skip
        gradients = torch.autograd.grad(output.sum() + final_state.sum(), list(tensors.values()))
    fake = {"output": output, "final_state": final_state} | {
        f"d_{name}": x for name, x in zip(tensors, gradients, strict=True)
    }
    assert fake.keys() == real.keys()
    for name, x in fake.items():
        assert (x.shape, x.dtype, x.device) == (real[name].shape, real[name].dtype, real[name].device), name
        assert x.is_contiguous() and real[name].is_contiguous(), name


@every_family
@pytest.mark.parametrize("make", [small, in_full], ids=["whole", "in full"])
def test_compiled_it_gives_the_same(make: Callable[[Recurrence], Case], form: Recurrence) -> None:
    case = make(form)
    borders = case.cu_seqlens

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        # Something of the compiler's own before and after.
        output, final_state = library.scan(
            **{"log_decay": None, "beta": None} | tensors | {"q": 2 * tensors["q"]}, decay=form.decay, scale=case.K**-0.5,
            cu_seqlens=borders, max_length=case.max_length, dense=case.dense, return_final_state=True,
        )  # fmt: skip
        return output + 1, final_state

    def eager(case: Case, tensors: Any) -> tuple[Tensor, Tensor | None]:
        output, final_state = kernels(case, {**tensors, "q": 2 * tensors["q"]})
        return output + 1, final_state

    inputs = draw(case)
    expected = results(eager, case, inputs)
    got = results(lambda case, tensors: compiled(dict(tensors)), case, inputs)
    for name, x in expected.items():
        assert torch.equal(got[name], x), name


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_nothing_is_kept_without_gradients(form: Recurrence) -> None:
    case = small(form)
    inputs = draw(case)
    with torch.no_grad():
        output, final_state = kernels(case, inputs)
    expected = results(kernels, case, inputs)
    assert torch.equal(output, expected["output"]) and torch.equal(final_state, expected["final_state"])
    assert not output.requires_grad and not final_state.requires_grad


B, T, H, K, V = 2, 37, 2, 5, 6


def of_op(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of an op, by name, and options."""
    q, k, v = torch.randn(B, T, 1, K), torch.randn(B, T, 1, K), torch.randn(B, T, H, V)
    unit, beta = torch.nn.functional.normalize(k, dim=-1), 2 * torch.rand(B, T, H)
    tensors, options = {
        "linear_attention": ({"q": q, "k": k, "v": v}, {}),
        "linear_attention, normalised": ({"q": q.exp(), "k": k.exp(), "v": v}, {"normalize": True}),
        "retnet": ({"q": q, "k": k, "v": v}, {}),
        "gla": ({"q": q, "k": k, "v": v, "log_decay": -torch.rand(B, T, H, K)}, {}),
        "mamba2": (
            {"C": q, "B": k, "x": v, "dt": torch.rand(B, T, H), "A": -torch.rand(H), "D": torch.randn(H)}, {},
        ),
        "deltanet": ({"q": q, "k": unit, "v": v, "beta": beta}, {}),
        "gated_deltanet": ({"q": q, "k": unit, "v": v, "log_decay": -torch.rand(B, T, H), "beta": beta}, {}),
    }[name]  # fmt: skip
    return {n: x.to(DEVICE) for n, x in tensors.items()}, options


def run_op(
    name: str, dtype: torch.dtype, impl: str, tensors: dict[str, Tensor], options: dict[str, Any]
) -> dict[str, Tensor]:
    op: Callable[..., RuleOutput] = getattr(ops, name.partition(",")[0])
    given = {n: x.to(dtype, copy=True).requires_grad_() for n, x in tensors.items()}
    result = op(**given, **options, return_final_state=True, impl=impl)
    made = {"output": result.output, "final_state": result.final_state}
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(x.shape, generator=generator).to(x.device, x.dtype) for x in made.values()]
    gradients = torch.autograd.grad(list(made.values()), list(given.values()), seeds)
    return made | {f"d_{n}": x for n, x in zip(given, gradients, strict=True)}


@pytest.mark.parametrize(
    "name", [name for name in ops.__all__ if name != "RuleOutput"] + ["linear_attention, normalised"]
)
def test_every_op_has_a_kernel_that_equals_its_chunked_form(name: str) -> None:
    tensors, options = of_op(name)
    state_rows = V + 1 if "normalize" in options else V
    tensors["initial_state"] = torch.randn(B, H, K, state_rows).to(DEVICE)
    if "normalize" in options:
        # The normaliser's column is a sum of positive numbers.
        tensors["initial_state"][..., -1] = tensors["initial_state"][..., -1].abs()
    got, reference = (run_op(name, torch.float32, impl, tensors, options) for impl in ("triton", "chunked"))
    assert_within_budget(got, reference, run_op(name, torch.float64, "chunked", tensors, options))


@pytest.mark.parametrize("form", [form for form in FORMS if form.decay is not Decay.NONE], ids=str)
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float32], ids=str)
def test_decays_of_a_millionth_at_every_token(form: Recurrence, dtype: torch.dtype) -> None:
    """The first of which is all of an initial state's gradient, and float16 has few bits for it."""
    case = Case(form, (40, 5, 1), 2, 1, K=20, V=17, spare=2, dtype=dtype)
    inputs = draw(case)
    inputs["log_decay"] = torch.full_like(inputs["log_decay"], math.log(1e-6))
    check(case, inputs)
    # Segments without a token have no first one, at a border and where no token is left. Their gradients are of another size.
    empty = replace(case, lengths=(0, 40, 0, 5, 1, 0), spare=0)
    states = draw(empty)["initial_state"]
    check(empty, {name: x[: empty.num_tokens] for name, x in inputs.items()} | {"initial_state": states})
    check(replace(case, lengths=(0, 0)), {name: x[:2] for name, x in inputs.items()})
