"""The router's kernels, and their gradients, against the router in PyTorch in float64, and the bugs that this must catch."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import DEVICE, DTYPES
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from poison import poisoned_memory
from scan_laws import Patch, assert_same_bits
from seeding import Bug, in_the_interpreter, over_the_budget, seed
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from linear_moe.kernels import router, router_operator
from linear_moe.kernels.router_operator import route
from linear_moe.layers.routing import LARGEST_KERNEL_CHOICES, Router
from linear_moe.testing.budget import assert_within_budget


@dataclass(frozen=True)
class Case:
    """A call, but for the numbers."""

    tokens: int
    choices: int = 4
    top_k: int = 2
    size: int = 20
    score: str = "softmax"
    renormalize: bool = True
    biased: bool = False
    shared: bool = False
    balance: float = 0.5
    z: float = 0.3
    pads: bool = True
    """Whether some tokens are pads, the first among them."""
    logits: float = 1.0
    """Their size."""
    dtype: torch.dtype = torch.float32
    """Of x."""
    weight_dtype: torch.dtype = torch.float32

    def router(self) -> Router:
        made = Router(
            self.size, self.choices, self.top_k, score=self.score, renormalize=self.renormalize, balance_weight=self.balance,
            z_loss_weight=self.z, balance_bias_rate=0.1 if self.biased else 0.0,
        )  # fmt: skip
        # Loads are observed in training; nothing else depends on it.
        return made.to(DEVICE).eval()

    def renormalizes(self) -> bool:
        return self.renormalize and (self.top_k > 1 or self.choices == 1)


Inputs = Mapping[str, Tensor]


def draw(case: Case) -> dict[str, Tensor]:
    """Inputs, and the gradients of the weights and the loss: of a pad's weights there is none."""
    S, M, D = case.tokens, case.choices, case.size
    valid = (torch.rand(S) < 0.7) & (torch.arange(S) > 0) if case.pads else torch.ones(S, dtype=torch.bool)
    d_weights = torch.randn(S, case.top_k + case.shared)
    inputs = {
        "x": torch.randn(S, D).to(case.dtype),
        "weight": (case.logits * D**-0.5 * torch.randn(M, D)).to(case.weight_dtype),
        "valid": valid,
        "d_weights": torch.where(valid[:, None], d_weights, 0),
        "d_loss": 0.5 + torch.rand(()),
    }
    if case.biased:
        inputs["bias"] = 0.3 * torch.randn(M)
    return {name: x.to(DEVICE) for name, x in inputs.items()}


def results(case: Case, inputs: Inputs, *, wide: bool = False, kernel: bool = True) -> dict[str, Tensor]:
    """What a router makes of the inputs, in float64 if `wide`, and the gradients."""
    x, weight = (inputs[name].detach().to(torch.float64 if wide else None).requires_grad_() for name in ("x", "weight"))
    tensors = {"weight": weight} | ({"bias.bias": inputs["bias"]} if case.biased else {})
    options = {"shared": case.shared, "kernel": kernel}
    routing, loss, _ = functional_call(case.router(), tensors, (x, inputs["valid"]), options)
    seeds = [inputs["d_weights"].to(routing.weights.dtype), inputs["d_loss"].to(loss.dtype)]
    d_x, d_weight = torch.autograd.grad([routing.weights, loss], [x, weight], seeds)
    names = ("indices", "weights", "load", "entropy", "balance_loss", "z_loss")
    made = {name: getattr(routing, name).detach() for name in names}
    return made | {"loss": loss.detach(), "d_x": d_x, "d_weight": d_weight}


def terms(case: Case, inputs: Inputs, exact: Inputs) -> dict[str, Tensor]:
    """What the results are sums and differences of, each number without its sign, with what the logits are sums of."""
    x, weight, valid = inputs["x"].double(), inputs["weight"].double(), inputs["valid"]
    picks, given = exact["indices"][:, : case.top_k], inputs["d_weights"].double()[:, : case.top_k].abs()
    logits, largest = x @ weight.t(), 1 + 2 * (x.abs() @ weight.abs().t()).amax(-1, keepdim=True)
    softmax, logsumexp = logits.softmax(-1), logits.logsumexp(-1, keepdim=True).abs()
    scores = softmax if case.score == "softmax" else logits.sigmoid()
    probabilities = scores / scores.sum(-1, keepdim=True)
    tokens = valid.sum().clamp_min(1)
    weights = exact["weights"][:, : case.top_k]
    by_weight = weights * (given + (weights * given).sum(-1, keepdim=True) * case.renormalizes())
    by_load = probabilities * case.choices * exact["load"] * inputs["d_loss"] * case.balance / tokens
    by_score = torch.zeros_like(logits).scatter(-1, picks, by_weight) + by_load
    by_score += probabilities * by_load.sum(-1, keepdim=True)
    softmax_terms = by_score + probabilities * by_score.sum(-1, keepdim=True)
    d_logits = softmax_terms if case.score == "softmax" else by_score * (1 - scores)
    d_logits = d_logits + inputs["d_loss"] * case.z * 2 * logsumexp / tokens * softmax
    d_logits = torch.where(valid[:, None], d_logits * largest, 0)
    z = (logsumexp * (logsumexp + largest))[valid].sum() / tokens
    balance = exact["balance_loss"] * largest.amax()
    return {
        "weights": weights * largest,
        "entropy": exact["entropy"] * largest.amax(),
        "balance_loss": balance,
        "z_loss": z,
        "loss": case.balance * balance + case.z * z,
        "d_x": d_logits @ weight.abs(),
        "d_weight": d_logits.t() @ x.abs(),
    }


def check(case: Case, inputs: Inputs | None = None) -> None:
    """The picks are the right ones; what is made of them, and the gradients, are within the error budget."""
    inputs = draw(case) if inputs is None else inputs
    exact = results(case, inputs, wide=True, kernel=False)
    every = [results(case, inputs), results(case, inputs, kernel=False), exact]
    of_terms = terms(case, inputs, exact) if case.tokens else None
    picks = [made.pop("indices") for made in every]
    if not torch.equal(picks[0], picks[2]):
        raise AssertionError(f"over the error budget: picks {picks[0].tolist()}, not {picks[2].tolist()}")
    assert_within_budget(*every, terms=of_terms)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    small = DEVICE == "cpu"
    choices = draw(st.integers(1, 20 if small else 256))
    return Case(
        tokens=draw(st.integers(1, 150 if small else 3000)),
        choices=choices,
        top_k=draw(st.integers(1, min(choices, 6))),
        size=draw(st.integers(1, 140 if small else 1500)),
        score=draw(st.sampled_from(["softmax", "sigmoid"])),
        renormalize=draw(st.booleans()),
        biased=draw(st.booleans()),
        shared=draw(st.booleans()),
        balance=draw(st.sampled_from([0.0, 0.5])),
        z=draw(st.sampled_from([0.0, 0.3])),
        pads=draw(st.booleans()),
        logits=draw(st.sampled_from([0.3, 1.0, 5.0])),
        dtype=draw(st.sampled_from(DTYPES)),
        weight_dtype=draw(st.sampled_from(DTYPES)),
    )


def tied(case: Case, inputs: Inputs) -> bool:
    """Whether float32 may not tell the picks of some token: of saturated sigmoids many are the same number."""
    x, weight = inputs["x"].double(), inputs["weight"].double()
    logits, spread = x @ weight.t(), (x.square() @ weight.square().t()).sqrt()
    scores = logits.softmax(-1) if case.score == "softmax" else logits.sigmoid()
    error = torch.finfo(torch.float32).eps * scores * (1 + (1 - scores) * spread)
    scores, order = (scores + inputs.get("bias", 0.0)).sort(-1, descending=True)
    error = error.gather(-1, order)
    close = scores[:, :-1] - scores[:, 1:] < 4 * torch.maximum(error[:, :-1], error[:, 1:])
    return bool(close[inputs["valid"], : case.top_k].any())


@settings(max_examples=15 if DEVICE == "cpu" else 200)
@given(cases())
def test_drawn_shapes_are_within_the_budget(case: Case) -> None:
    inputs = draw(case)
    assume(not tied(case, inputs))
    check(case, inputs)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("choices", "top_k"), [(1, 1), (2, 1), (2, 2), (4, 3), (5, 5), (64, 1), (64, 7)])
def test_scores_and_picks(score: str, renormalize: bool, choices: int, top_k: int) -> None:
    check(Case(9, choices, top_k, score=score, renormalize=renormalize, biased=True))
    check(Case(3, choices, top_k, score=score, renormalize=renormalize, shared=True, z=0.0, pads=False))


@pytest.mark.parametrize(
    "case",
    [
        Case(1, pads=False),
        Case(65),
        Case(router.FEW.rows, pads=False),
        Case(2 * router.FEW.rows + 1, pads=False, size=2 * router.FEW.channels + 3),
        Case(router.MANY.rows + 1, 64, 3, size=router.MANY.channels + 1),
        Case(2 * router.MOST.rows + 1, 200, 3, size=router.MOST.channels + 1),
        Case(2, LARGEST_KERNEL_CHOICES, 3),
        Case(2, LARGEST_KERNEL_CHOICES + 1, 3),
    ],
    ids=str,
)
def test_sizes(case: Case) -> None:
    check(case)


def test_no_token() -> None:
    check(Case(0, shared=True))
    check(Case(0, biased=True, score="sigmoid"))


PADDED = Case(router.FEW.rows + 9, 5, 3, shared=True, biased=True)
EXAMPLES = {
    "padded": PADDED,
    "plain": Case(2 * router.FEW.rows + 1, pads=False, z=0.0, size=router.FEW.channels + 2),
    "sigmoid": replace(PADDED, score="sigmoid", renormalize=False),
}
every_example = pytest.mark.parametrize("case", EXAMPLES.values(), ids=EXAMPLES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_programs_that_go_on_to_the_next_tile(dtype: torch.dtype, monkeypatch: Patch) -> None:
    monkeypatch.setattr(router, "num_processors", lambda device: 1)
    check(Case(10 * router.FEW.back_rows + 1, dtype=dtype, weight_dtype=dtype))


@pytest.mark.parametrize("used", ["weights", "loss"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_a_loss_of_either_alone(used: str, score: str) -> None:
    case = replace(PADDED, score=score)
    inputs = draw(case)

    def gradients(wide: bool) -> tuple[Tensor, ...]:
        x, weight = (inputs[name].to(torch.float64 if wide else None).requires_grad_() for name in ("x", "weight"))
        tensors = {"weight": weight, "bias.bias": inputs["bias"]}
        options = {"shared": True, "kernel": not wide}
        routing, loss, _ = functional_call(case.router(), tensors, (x, inputs["valid"]), options)
        scalar = loss if used == "loss" else (routing.weights * inputs["d_weights"]).sum()
        return torch.autograd.grad(scalar, [x, weight])

    for made, expected in zip(gradients(False), gradients(True), strict=True):
        assert made.any()
        torch.testing.assert_close(made.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_ties_go_to_the_lowest(score: str) -> None:
    x, valid = torch.randn(70, 12, device=DEVICE), torch.ones(70, dtype=torch.bool, device=DEVICE)
    made = route(x, torch.zeros(6, 12, device=DEVICE), valid, top_k=4, score=score)
    assert torch.equal(made.indices, torch.arange(4, device=DEVICE).expand(70, 4))
    torch.testing.assert_close(made.weights, torch.full((70, 4), 0.25, device=DEVICE), rtol=1e-6, atol=0)
    weight = torch.randn(3, 12, device=DEVICE)
    indices = route(x, weight.repeat(2, 1), valid, top_k=6, score=score).indices
    # A choice and its double, the lower first.
    assert torch.equal(indices[:, 1::2], indices[:, ::2] + 3)


def test_picks_are_choices_that_differ_whatever_the_numbers_are() -> None:
    x, weight = torch.randn(5, 8, device=DEVICE), torch.randn(5, 8, device=DEVICE)
    x[1], x[2, 0], x[3] = torch.nan, torch.inf, 1e30
    bias = torch.tensor([0.0, -torch.inf, torch.nan, -torch.inf, torch.inf], device=DEVICE)
    valid = torch.ones(5, dtype=torch.bool, device=DEVICE)
    with warnings.catch_warnings():
        # numpy, which the interpreter is, warns of them.
        warnings.simplefilter("ignore", RuntimeWarning)
        for given in (None, bias):
            for score in ("softmax", "sigmoid"):
                indices = route(x, weight, valid, top_k=5, score=score, bias=given).indices
                assert torch.equal(indices.sort().values, torch.arange(5, device=DEVICE).expand(5, 5))


def test_scores_that_underflow() -> None:
    weight, valid = torch.eye(3, device=DEVICE), torch.ones(1, dtype=torch.bool, device=DEVICE)
    made = route(torch.tensor([[0.0, -200.0, -300.0]], device=DEVICE), weight, valid, top_k=2)
    assert made.indices.tolist() == [[0, 1]] and made.weights.tolist() == [[1.0, 0.0]]
    assert made.load.tolist() == [0.5, 0.5, 0.0]
    weight.requires_grad_()
    made = route(torch.full((1, 3), -200.0, device=DEVICE), weight, valid, top_k=2, score="sigmoid", balance_weight=1.0)
    (gradient,) = torch.autograd.grad(100 * made.weights.sum() + made.loss, weight)
    assert all(x.isfinite().all() for x in (*made, gradient))


@every_example
def test_pads_are_in_nothing_whatever_stands_in_them(case: Case) -> None:
    case = replace(case, pads=True)
    inputs = draw(case)
    expected, pad = results(case, inputs), ~inputs["valid"]
    ill = {name: x.clone() for name, x in inputs.items()}
    ill["x"][pad] = torch.nan
    ill["d_weights"][pad] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        made = results(case, ill)
    assert pad.any() and not made["d_x"][pad].any() and expected["d_x"][~pad].any()
    for x in (expected, made):
        # What a pad is picked for means nothing.
        for name in ("indices", "weights"):
            x[name] = x[name][~pad]
    assert_same_bits(expected, made)


@every_example
def test_a_nan_stays_with_its_token(case: Case) -> None:
    case = replace(case, pads=False, balance=0.0, z=0.0)
    inputs = draw(case)
    expected, token = results(case, inputs), 4
    ill = {name: x.clone() for name, x in inputs.items()}
    ill["x"][token] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        made = results(case, ill)
    assert made["weights"][token, : case.top_k].isnan().all() and made["d_x"][token].isnan().all()
    others = torch.arange(case.tokens, device=DEVICE) != token
    for name in ("indices", "weights"):
        assert torch.equal(made[name][others], expected[name][others]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
def test_a_token_is_routed_alike_alone_and_among_others(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    case = Case(3 * router.FEW.rows + 5, 6, 2, 100, biased=True, dtype=dtype, weight_dtype=weight_dtype, pads=False)
    inputs = draw(case)

    def parts(begin: int, end: int) -> tuple[Tensor, ...]:
        options = {"top_k": 2, "bias": inputs["bias"]}
        made = route(inputs["x"][begin:end], inputs["weight"], inputs["valid"][begin:end], **options)
        return made.indices, made.weights

    together = parts(0, case.tokens)
    for begin, end in ((0, 1), (7, 9), (router.FEW.rows - 1, 2 * router.FEW.rows + 3)):
        for alone, whole in zip(parts(begin, end), together, strict=True):
            assert torch.equal(alone, whole[begin:end])


@every_example
def test_same_bits_twice_and_memory_is_written_before_it_is_read(case: Case) -> None:
    inputs = draw(case)
    once = results(case, inputs)
    assert_same_bits(once, results(case, inputs))
    with poisoned_memory():
        assert_same_bits(once, results(case, inputs))


@every_example
def test_strides_change_nothing(case: Case) -> None:
    inputs = draw(case)
    apart = {name: torch.stack([x, x], -1)[..., 0] for name, x in inputs.items()}
    assert_same_bits(results(case, inputs), results(case, apart))


@every_example
def test_what_torch_asks_of_an_operator(case: Case) -> None:
    case = replace(case, tokens=2)
    inputs = draw(case)
    options = (case.top_k, case.shared, case.score == "sigmoid", case.renormalize, case.balance, case.z)
    torch.library.opcheck(
        router_operator._route,
        (inputs["x"], inputs["weight"], inputs["valid"], inputs.get("bias"), *options),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"),
    )


def test_what_the_tokens_next_use_sends_back_is_added() -> None:
    inputs = draw(PADDED)
    x = inputs["x"].requires_grad_()
    made = route(x, inputs["weight"], inputs["valid"], top_k=2, balance_weight=1.0)
    assert torch.equal(made.tokens, x)
    seeds = [inputs["d_weights"][:, :2], inputs["d_loss"], torch.randn_like(x)]
    alone, both, other = (
        torch.autograd.grad([made.weights, made.loss, made.tokens][part], x, seeds[part], retain_graph=True)[0]
        for part in (slice(2), slice(3), slice(2, 3))
    )
    assert torch.equal(other, seeds[2])
    torch.testing.assert_close(both, alone + other)


def test_only_weights_loss_and_tokens_have_gradients() -> None:
    inputs = draw(PADDED)
    made = route(inputs["x"].requires_grad_(), inputs["weight"], inputs["valid"], top_k=2)
    assert [name for name, x in made._asdict().items() if x.requires_grad] == ["weights", "loss", "tokens"]
    made = route(inputs["x"].detach(), inputs["weight"].requires_grad_(), inputs["valid"], top_k=2)
    assert [name for name, x in made._asdict().items() if x.requires_grad] == ["weights", "loss"]


@every_example
def test_fake_tensors_have_the_shapes_of_real_ones(case: Case) -> None:
    inputs = draw(replace(case, dtype=DTYPES[-1]))
    real = results(case, inputs)
    with FakeTensorMode() as mode:
        fake_inputs = {name: mode.from_tensor(x) for name, x in inputs.items()}
        x, weight = fake_inputs["x"].requires_grad_(), fake_inputs["weight"].requires_grad_()
        made = route(x, weight, fake_inputs["valid"], top_k=case.top_k, shared=case.shared)
        d_x, d_weight = torch.autograd.grad(made.weights.sum() + made.loss, [x, weight])
    real["tokens"] = inputs["x"]
    for name, fake in {**made._asdict(), "d_x": d_x, "d_weight": d_weight}.items():
        assert (fake.shape, fake.dtype, fake.device) == (real[name].shape, real[name].dtype, real[name].device), name
        assert fake.is_contiguous() and real[name].is_contiguous(), name


@every_example
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_into_one_graph_it_is_the_same(case: Case) -> None:
    case = replace(case, tokens=3)
    inputs = draw(case)

    def run(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        # Something of the compiler's own before and after.
        made = route(
            2 * x, weight, inputs["valid"], top_k=case.top_k, score=case.score, shared=case.shared,
            bias=inputs.get("bias"), balance_weight=case.balance, z_loss_weight=case.z,
        )  # fmt: skip
        return made.weights + 1, made.loss * 3, made.load + 1

    def measured(function: Any) -> dict[str, Tensor]:
        x, weight = (inputs[name].detach().requires_grad_() for name in ("x", "weight"))
        weights, loss, load = function(x, weight)
        d_x, d_weight = torch.autograd.grad([weights, loss], [x, weight], [inputs["d_weights"], inputs["d_loss"]])
        return {"weights": weights.detach(), "loss": loss.detach(), "load": load, "d_x": d_x, "d_weight": d_weight}

    assert_same_bits(measured(run), measured(torch.compile(run, fullgraph=True, backend="aot_eager")))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "x": ({"x": torch.zeros(4)}, r"x must be \[S, D\], got shape \[4\]"),
    "x dtype": ({"x": torch.zeros(4, 3).double()}, "x must be of dtype float32, bfloat16, float16, got torch.float64"),
    "weight": ({"weight": torch.zeros(5, 2)}, r"weight must be \[M, D\] .* D = 3, got shape \[5, 2\]"),
    "weight none": ({"weight": torch.zeros(0, 3)}, r"weight must be \[M, D\] with M from 1 to 256 .*, got shape \[0, 3\]"),
    "weight many": ({"weight": torch.zeros(257, 3)}, r"weight must be .* got shape \[257, 3\]"),
    "weight dtype": ({"weight": torch.zeros(5, 3).double()}, "weight must be of dtype .*, got torch.float64"),
    "valid": ({"valid": torch.zeros(3, dtype=torch.bool)}, r"valid must be \[S\] = \[4\], got shape \[3\]"),
    "valid dtype": ({"valid": torch.zeros(4)}, "valid must be of dtype bool, got torch.float32"),
    "valid device": (
        {"valid": torch.zeros(4, dtype=torch.bool, device="meta")}, "valid must be on the device .*, got meta",
    ),
    "bias": ({"bias": torch.zeros(4)}, r"bias must be \[M\] = \[5\], got shape \[4\]"),
    "bias dtype": ({"bias": torch.zeros(5).half()}, "bias must be of dtype float32, got torch.float16"),
    "top_k": ({"top_k": 6}, "top_k must be from 1 to M = 5, got 6"),
    "score": ({"score": "softmx"}, "score must be softmax or sigmoid, got 'softmx'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    changes, message = BAD[case]
    good = {"x": torch.zeros(4, 3), "weight": torch.zeros(5, 3), "valid": torch.ones(4, dtype=torch.bool), "top_k": 2}
    given = {
        name: x.to(DEVICE) if isinstance(x, Tensor) and x.device.type != "meta" else x
        for name, x in (good | changes).items()
    }
    with pytest.raises(ValueError, match=message):
        route(given.pop("x"), given.pop("weight"), given.pop("valid"), **given)


LONG = Case(router.FEW.rows + 2, size=router.FEW.channels + 2, pads=False)
SIGMOID = replace(PADDED, score="sigmoid")
BUGS: dict[str, tuple[Case, str, str]] = {
    "the last channels are not read": (LONG, "range(0, SIZE, WIDTH)", "range(0, SIZE - WIDTH, WIDTH)"),
    "the first channels are read again": (LONG, "channels = first + tl.arange", "channels = first * 0 + tl.arange"),
    "choices that are none take part in the softmax": (
        PADDED,
        'logits = tl.where(inside, logits, float("-inf"))',
        "logits = logits + 0.0",
    ),
    "the largest logit is left out of the logsumexp": (PADDED, "largest + tl.log(total)", "tl.log(total)"),
    "sigmoids of no choice count": (
        SIGMOID,
        "        scores = tl.where(inside, sigmoids(logits)[0], 0.0)",
        "        scores = sigmoids(logits)[0]",
    ),
    "sigmoids are no probabilities": (
        SIGMOID,
        "tl.div_rn(scores, tl.broadcast_to(_total(scores)[:, None], (ROWS, BLOCK)))",
        "scores",
    ),
    "the bias is forgotten": (PADDED, "selection += tl.load", "selection += 0.0 * tl.load"),
    "the bias changes the weights": (
        PADDED,
        "weights = tl.where(picked, scores, 0.0)",
        "weights = tl.where(picked, selection, 0.0)",
    ),
    "a pick is picked again": (PADDED, "free = inside & (rank == TOP_K)", "free = inside & (rank == rank)"),
    "the first pick is no pick": (PADDED, "range(TOP_K):\n        free", "range(1, TOP_K):\n        free"),
    "weights stand where their choices do": (
        PADDED,
        "rows[:, None] * columns + rank",
        "rows[:, None] * columns + choices[None, :]",
    ),
    "weights are left as they are": (
        PADDED,
        "    if RENORMALIZE:\n        weights = tl.div_rn",
        "    if False:\n        weights = tl.div_rn",
    ),
    "the shared choice weighs nothing": (
        PADDED,
        "tl.full((ROWS,), 1.0, tl.float32)",
        "tl.full((ROWS,), 0.0, tl.float32)",
    ),
    "the shared choice is the last": (PADDED, "(ROWS,), CHOICES, tl.int64)", "(ROWS,), CHOICES - 1, tl.int64)"),
    "pads are counted": (PADDED, "(picked & valid[:, None]).to", "(picked & in_rows[:, None]).to"),
    "pads have probabilities": (
        PADDED,
        "tl.where(valid[:, None], probabilities, 0.0)",
        "tl.where(in_rows[:, None], probabilities, 0.0)",
    ),
    "pads have an entropy": (PADDED, "tl.where(valid, entropies, 0.0)", "tl.where(in_rows, entropies, 0.0)"),
    "pads have a z-loss": (PADDED, "tl.where(valid, logsumexp", "tl.where(in_rows, logsumexp"),
    "pads are tokens": (PADDED, "tokens = tl.sum(valid.to", "tokens = tl.sum(in_rows.to"),
    "the last program is not summed": (PADDED, "made = program < num_programs", "made = program < num_programs - 1"),
    "a loss has the other's weight": (
        PADDED,
        "balance_weight * balance + z_weight",
        "z_weight * balance + balance_weight",
    ),
    "a gradient is another pick's": (PADDED, "tl.load(d_weights_ptr + at,", "tl.load(d_weights_ptr + rows * COLUMNS,"),
    "slots lie without the shared one": (PADDED, "at = rows * COLUMNS + pick", "at = rows * TOP_K + pick"),
    "the sum is taken as a constant": (PADDED, "given -= along[:, None]", "given -= 0.0 * along[:, None]"),
    "loads are even": (PADDED, "CHOICES) * load)[None, :]", "CHOICES) * (load * 0.0 + 0.2))[None, :]"),
    "the loss's gradient is per batch": (
        PADDED,
        "per_token = tl.load(d_loss_ptr) / tl.load(statistics_ptr + CHOICES + 3)",
        "per_token = tl.load(d_loss_ptr)",
    ),
    "a sigmoid's slope is its value": (SIGMOID, "d_logits = by_score * certain", "d_logits = by_score * scores"),
    "a sigmoid's probability has no sum": (
        SIGMOID,
        "by_probability = by_probability - along[:, None]",
        "by_probability = by_probability - 0.0 * along[:, None]",
    ),
    "the softmax has no sum": (PADDED, "by_score - probabilities * tl.sum(by_score, 1)[:, None]", "by_score"),
    "the z-loss is no square": (PADDED, "z_weight * 2.0", "z_weight"),
    "the second part of a number is forgotten": (
        replace(LONG, dtype=torch.float16, weight_dtype=torch.float16, logits=0.1),
        "tl.dot(high, b.to",
        "tl.dot(high * 0.0, b.to",
    ),
    "a step's gradient takes the last's place": (
        LONG,
        "d_weight = _product(transposed, x, d_weight,",
        "d_weight = _product(transposed, x, d_weight * 0.0,",
    ),
    "the last tile is left out": (
        LONG,
        "tl.minimum((num_tokens - first + ROWS - 1) // ROWS",
        "tl.minimum((num_tokens - first) // ROWS",
    ),
    "the last partial sum is left out": (
        LONG,
        "(partial < num_partials)[:, None]",
        "(partial < num_partials - 1)[:, None]",
    ),
}


@in_the_interpreter
@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_are_caught(bug: str, tmp_path: Path, monkeypatch: Patch) -> None:
    case, right, wrong = BUGS[bug]
    copy = seed(router, Bug(router, right, wrong), tmp_path)
    monkeypatch.setattr(copy, "num_processors", lambda device: 1)
    monkeypatch.setattr(router_operator, "kernels", copy)
    with over_the_budget():
        check(case)


@in_the_interpreter
@pytest.mark.parametrize("case", [PADDED, LONG, SIGMOID], ids=["padded", "long", "sigmoid"])
def test_a_copy_without_a_bug_keeps_the_budget(case: Case, tmp_path: Path, monkeypatch: Patch) -> None:
    copy = seed(router, None, tmp_path)
    monkeypatch.setattr(copy, "num_processors", lambda device: 1)
    monkeypatch.setattr(router_operator, "kernels", copy)
    check(case)


@pytest.mark.gpu
def test_tensors_past_the_int32_offsets() -> None:
    tokens, size = 2**21 + 40, 1024
    free, _ = torch.cuda.mem_get_info()
    if free < 4 * tokens * size * 3:
        pytest.skip(f"needs {4 * tokens * size * 3 / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} are free")
    case = Case(tokens, size=size, shared=True, pads=False, dtype=torch.bfloat16, weight_dtype=torch.bfloat16)
    inputs = {
        "x": torch.randn(tokens, size, device=DEVICE, dtype=case.dtype),
        "weight": torch.randn(4, size, device=DEVICE, dtype=case.dtype) / 32,
        "valid": torch.ones(tokens, dtype=torch.bool, device=DEVICE),
        "d_weights": torch.randn(tokens, 3, device=DEVICE),
        "d_loss": torch.zeros((), device=DEVICE),
    }
    together = results(case, inputs)
    last = slice(tokens - 30, None)
    alone = results(
        replace(case, tokens=30), {n: x[last] if n in ("x", "valid", "d_weights") else x for n, x in inputs.items()}
    )
    for name in ("indices", "weights", "d_x"):
        assert torch.equal(together[name][last], alone[name]), name


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu_and_a_captured_graph_gives_the_same_numbers() -> None:
    case = Case(3000, size=256, shared=True, biased=True, dtype=torch.bfloat16, weight_dtype=torch.bfloat16)
    inputs, module = draw(case), case.router()

    def run() -> dict[str, Tensor]:
        x, weight = inputs["x"].detach().requires_grad_(), inputs["weight"].detach().requires_grad_()
        tensors = {"weight": weight, "bias.bias": inputs["bias"]}
        routing, loss, _ = functional_call(module, tensors, (x, inputs["valid"]), {"shared": True, "kernel": True})
        d_x, d_weight = torch.autograd.grad(
            [routing.weights, loss], [x, weight], [inputs["d_weights"], inputs["d_loss"]]
        )
        made = {name: getattr(routing, name).detach() for name in ("indices", "weights", "load", "entropy")}
        return made | {"loss": loss.detach(), "d_x": d_x, "d_weight": d_weight}

    run()
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for name, x in draw(case).items():
        inputs[name].copy_(x)
    graph.replay()
    replayed = {name: x.clone() for name, x in captured.items()}
    assert_same_bits(replayed, run())
