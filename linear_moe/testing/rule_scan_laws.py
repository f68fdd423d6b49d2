"""What holds of every implementation of a recurrence, however its tokens are packed, cut and run."""

from __future__ import annotations

import torch
from torch import Tensor

from linear_moe.forms import Erase
from linear_moe.testing.laws import (
    Case,
    Law,
    Violation,
    require_all_close,
    require_close,
    require_same_bits,
    require_zero,
)
from linear_moe.testing.rule_inputs import Inputs, Run, differentiate, draw, gradients, has_form, impls

CAUSAL = 1e-12
"""How far a change of a later token may move an earlier float64 output, by rounding alone."""


def _chunked(case: Case) -> None:
    inputs = draw(case)
    require_all_close(gradients(inputs, "chunked"), gradients(inputs, "recurrent"))


def _dense(case: Case) -> None:
    if len(set(case.lengths)) > 1:
        return
    inputs = draw(case)
    for impl in impls(inputs.rule):
        require_all_close(gradients(inputs, impl, dense=True), gradients(inputs, impl))


def _separate(case: Case) -> None:
    inputs = draw(case)
    owner = _owner(case)
    for impl in impls(inputs.rule):
        packed = inputs.run(impl)
        for n, length in enumerate(case.lengths):
            rows = torch.arange(owner.numel())[owner == n]
            alone = inputs.part(rows, [length], inputs.state[n : n + 1]).run(impl, dense=True)
            require_close(f"the output of sequence {n} ({impl})", packed.output[rows], alone.output)
            require_close(f"the final state of sequence {n} ({impl})", packed.final_state[n], alone.final_state[0])


def _split(case: Case) -> None:
    inputs = draw(case)
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.tensors.items()}
    inputs = inputs.with_tensors(leaves)
    generator = torch.Generator().manual_seed(case.seed)
    cuts = [int(torch.randint(0, length + 1, (), generator=generator)) for length in case.lengths]
    rest = [length - cut for length, cut in zip(case.lengths, cuts, strict=True)]
    early = inputs.positions < torch.tensor(cuts, dtype=torch.int64)[_owner(case)]
    # Stable: the rows of the first call and then those of the second, each in their order.
    rows = (~early).long().argsort(stable=True)
    for impl in impls(inputs.rule):
        first = inputs.part(rows[: sum(cuts)], cuts, inputs.state).run(impl)
        second = inputs.part(rows[sum(cuts) :], rest, first.final_state).run(impl)
        output = torch.cat((first.output, second.output))[rows.argsort()]
        try:
            require_all_close(differentiate(Run(output, second.final_state), leaves), gradients(inputs, impl))
        except Violation as violation:
            raise Violation(f"{impl}, first {cuts} tokens and then {rest}: {violation}") from None


def _causal(case: Case) -> None:
    inputs = draw(case)
    owner = _owner(case)
    if owner.numel() < 2:
        return
    cut = int(torch.randint(1, owner.numel(), (), generator=torch.Generator().manual_seed(case.seed)))
    tokens = torch.arange(owner.numel())
    # Half of a log decay or of a beta is one too.
    later = {name: torch.cat((x[:cut], 0.5 * x[cut:])) for name, x in inputs.by_token.items()}
    for impl in impls(inputs.rule):
        _require_no_gradient(
            inputs, impl, tokens < cut, tokens >= cut, f"outputs before token {cut} for {{}} from it on"
        )
        last = owner == owner[-1]
        _require_no_gradient(inputs, impl, last, ~last, "outputs of the last sequence for {} of the others")
        moved, unmoved = inputs.with_tensors(later).run(impl).output[:cut], inputs.run(impl).output[:cut]
        require_close(f"the output before the changed token {cut} ({impl})", moved, unmoved, CAUSAL)


def _require_no_gradient(inputs: Inputs, impl: str, outputs: Tensor, tokens: Tensor, what: str) -> None:
    """The gradient of some `outputs` `[S]` for some `tokens` `[S]` is exactly 0."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.by_token.items()}
    read = inputs.with_tensors(leaves).run(impl).output[outputs]
    for name, grad in zip(
        leaves, torch.autograd.grad(read.square().sum(), list(leaves.values()), allow_unused=True), strict=True
    ):
        require_zero(f"the gradient of {what.format(name)} ({impl})", None if grad is None else grad[tokens])


def _idle(case: Case) -> None:
    inputs = draw(case, as_tokens=True)
    assert inputs.rule.form is not None
    idle = ("log_decay", "k" if inputs.rule.form.erase is Erase.NONE else "beta")
    inputs = inputs.with_tensors({name: torch.zeros_like(x) for name, x in inputs.tensors.items() if name in idle})
    for impl in impls(inputs.rule):
        require_same_bits(f"the final state ({impl})", inputs.run(impl).final_state, inputs.state)


def _empty(case: Case) -> None:
    inputs = draw(case, as_tokens=True)
    # Empty sequences on both sides of each of the case's own.
    lengths = [0, *(x for length in case.lengths for x in (length, 0))]
    states = case.randn(len(lengths), *inputs.state.shape[1:], stream=102)
    states[1::2] = inputs.state
    beside = inputs.part(torch.arange(sum(case.lengths)), lengths, states)
    empty = torch.tensor(lengths) == 0
    for impl in impls(inputs.rule):
        run = beside.run(impl)
        require_same_bits(f"the state of a sequence without tokens ({impl})", run.final_state[empty], states[empty])
        require_close(f"the output beside empty sequences ({impl})", run.output, inputs.run(impl).output)


def _linear(case: Case) -> None:
    inputs = draw(case, as_tokens=True)
    other = {"v": case.randn(*inputs.by_token["v"].shape, stream=101), "initial_state": 2 * inputs.state}
    both = {name: 3 * inputs.tensors[name] - 2 * x for name, x in other.items()}
    for impl in impls(inputs.rule):
        runs = [inputs.with_tensors(tensors).run(impl) for tensors in ({}, other, both)]
        for name, one, two, combined in zip(Run._fields, *runs, strict=True):
            require_close(f"the {name} of 3 (v, state) - 2 (v', state') ({impl})", combined, 3 * one - 2 * two)


def _shared_keys(case: Case) -> None:
    inputs = draw(case, as_tokens=True)
    heads = inputs.by_token["v"].shape[1]
    keys = {name: inputs.by_token[name] for name in ("q", "k")}
    repeated = {name: x.repeat_interleave(heads // x.shape[1], 1) for name, x in keys.items()}
    for impl in impls(inputs.rule):
        runs = zip(Run._fields, inputs.run(impl), inputs.with_tensors(repeated).run(impl), strict=True)
        for name, got, expected in runs:
            require_close(f"the {name} ({impl})", got, expected)


def _owner(case: Case) -> Tensor:
    """`[S]` the sequence each token is of."""
    return torch.arange(len(case.lengths)).repeat_interleave(torch.tensor(case.lengths, dtype=torch.int64))


SCAN_LAWS: tuple[Law, ...] = (
    Law(
        "chunked-equals-recurrent",
        "the chunked form gives the outputs, final state and gradients of the step, to 1e-10 in float64",
        _chunked,
        has_form,
    ),
    Law(
        "causal",
        "no output depends on a later token or on another sequence: that gradient is exactly 0, and a change of a later "
        "token moves no earlier output",
        _causal,
    ),
    Law("dense-equals-packed", "a batch of equally long sequences gives what they give packed", _dense),
    Law("packed-equals-separate", "packed sequences give what each gives alone", _separate),
    Law(
        "split-equals-whole",
        "cut anywhere and continued from the carried state, the outputs, state and gradients are those of the whole",
        _split,
    ),
    Law(
        "idle-token-keeps-state",
        "with decay 1 and strength 0 (k = 0, or beta = 0 with the erase) the state keeps its bits",
        _idle,
        has_form,
    ),
    Law("empty-sequence-keeps-state", "a sequence without tokens keeps its state, bit for bit", _empty),
    Law("linear-in-values", "outputs and final state are linear in (v, initial state)", _linear, has_form),
    Law("shared-keys-equal-repeated", "value heads that share a key head equal the key head repeated", _shared_keys),
)
