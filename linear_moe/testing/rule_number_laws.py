"""The numbers of every implementation of a recurrence: finite, near enough, and right in their derivatives."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from linear_moe.forms import Decay
from linear_moe.testing.budget import error_budget
from linear_moe.testing.laws import (
    Case,
    Law,
    Sizes,
    Violation,
    require,
    require_close,
    require_finite,
    require_same_bits,
)
from linear_moe.testing.rule_inputs import Inputs, Run, differentiate, draw, gradients, has_form, impls


def _finite(case: Case) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        inputs = draw(case, dtype)
        for impl in impls(inputs.rule):
            for name, x in gradients(inputs, impl).items():
                require_finite(f"{name} ({impl}, {str(dtype).removeprefix('torch.')})", x)


def _budget(dtype: torch.dtype) -> Callable[[Case], None]:
    def check(case: Case) -> None:
        inputs = draw(case, dtype, as_tokens=True)
        candidate, reference = gradients(inputs, "chunked"), gradients(inputs, "recurrent")
        exact = gradients(_in_float64(inputs), "recurrent")
        if inputs.rule.form is not None and inputs.rule.form.decay is Decay.HEAD:
            # One number a head, a sum over all tokens that may cancel to nothing: there is no scale to hold its error to.
            for measured in (candidate, reference, exact):
                measured.pop("gradient of log_decay", None)
        for name, expected in (("output", inputs.by_token["v"].dtype), ("final_state", torch.float32)):
            require(candidate[name].dtype == expected, f"{name} is {candidate[name].dtype}, expected {expected}")
        budgets = error_budget(candidate, reference, exact, dtype, _terms(inputs, exact))
        over = [str(budget) for budget in budgets if not budget.holds]
        require(not over, "; ".join(over))

    return check


def _terms(inputs: Inputs, exact: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A decay's gradient is a sum of differences of q dq and k dk, which go on where it vanishes."""
    if "log_decay" not in inputs.by_token:
        return {}
    products = [inputs.tensors[name].double() * exact[f"gradient of {name}"] for name in ("q", "k")]
    if inputs.by_token["log_decay"].dim() == 2:
        products = [x.sum(-1) for x in products]
    return {"gradient of log_decay": torch.cat(products)}


def _in_float64(inputs: Inputs) -> Inputs:
    """The same numbers."""
    return inputs.with_tensors({name: x.double() for name, x in inputs.tensors.items()})


def _strides(case: Case) -> None:
    inputs = draw(case, as_tokens=True)
    strided = inputs.with_tensors({name: _strided(x) for name, x in inputs.tensors.items()})
    for impl in impls(inputs.rule):
        for name, got, expected in zip(Run._fields, strided.run(impl), inputs.run(impl), strict=True):
            require_close(f"the {name} ({impl})", got, expected)


def _strided(x: Tensor) -> Tensor:
    """The same numbers, every other one of a storage whose dims lie in the reverse order."""
    wide = torch.full((*reversed(x.shape), 2), torch.nan, dtype=x.dtype)
    view = wide[..., 0].permute(*reversed(range(x.dim())))
    return view.copy_(x)


def _autocast(case: Case) -> None:
    inputs = draw(case, torch.float32, as_tokens=True)
    for impl in impls(inputs.rule):
        expected = gradients(inputs, impl)
        leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.tensors.items()}
        with torch.autocast("cpu", torch.bfloat16):
            run = inputs.with_tensors(leaves).run(impl)
        # The backward pass runs outside of autocast, as torch asks for.
        got = differentiate(run, leaves)
        for name, x in got.items():
            require_same_bits(f"{name} ({impl})", x, expected[name])


def _gradients(case: Case) -> None:
    inputs = draw(case, as_tokens=True)
    names = [name for name, x in inputs.tensors.items() if x.numel()]
    leaves = [inputs.tensors[name].double().requires_grad_() for name in names]
    for impl in impls(inputs.rule):

        def function(*tensors: Tensor, impl: str = impl) -> tuple[Tensor, ...]:
            return tuple(inputs.with_tensors(dict(zip(names, tensors, strict=True))).run(impl))

        try:
            torch.autograd.gradcheck(function, leaves)
        except GradcheckError as error:
            raise Violation(f"gradcheck of {', '.join(names)} ({impl}): {error}") from None


FINITE_LAW = Law(
    "finite", "finite inputs give finite outputs, states and gradients, for decays from 1 to 1e-6 a token", _finite
)

NUMBER_LAWS: tuple[Law, ...] = (
    Law(
        "float32-budget",
        "chunked float32 errs within its error budget",
        _budget(torch.float32),
        has_form,
        # An error's maximum over a few numbers is chance: 16 heads. And many keys of few channels, or nearly parallel ones,
        # have no well conditioned inverse for the delta rule to be made of.
        sizes=Sizes(tokens=(64, 100), num_heads=(16, 16), head_dim=(16, 24), kinds=("rule", "drawn")),
        max_examples=3,
    ),
    Law("bfloat16-budget", "chunked bfloat16 errs within its error budget", _budget(torch.bfloat16), has_form),
    Law("strides-do-not-matter", "non-contiguous inputs give the same results", _strides),
    Law("autocast-does-not-matter", "an op under autocast gives the bits it gives without", _autocast),
    Law(
        "gradients-are-derivatives",
        "gradients are the derivatives (gradcheck at its default settings)",
        _gradients,
        sizes=Sizes(tokens=(0, 4), num_heads=(1, 1), head_dim=(1, 2)),
        max_examples=4,
    ),
)
