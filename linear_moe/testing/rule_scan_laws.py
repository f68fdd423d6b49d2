"""What holds of every implementation of a recurrence: however the tokens are cut, packed and run, the results are the step's."""

from __future__ import annotations

import torch

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
from linear_moe.testing.rule_inputs import Run, differentiate, draw, gradients, has_form, impls

CAUSAL = 1e-12
"""How far a change of a later token may move an earlier float64 output, by rounding alone."""


def _chunked(case: Case) -> None:
    inputs = draw(case)
    require_all_close(gradients(inputs, "chunked"), gradients(inputs, "recurrent"))


def _dense(case: Case) -> None:
    if len(set(case.lengths)) != 1:
        return
    inputs = draw(case)
    for impl in impls(inputs.rule):
        require_all_close(gradients(inputs, impl, dense=True), gradients(inputs, impl))


def _separate(case: Case) -> None:
    inputs = draw(case)
    for impl in impls(inputs.rule):
        packed = inputs.run(impl)
        start = 0
        for n, length in enumerate(inputs.lengths):
            rows = torch.arange(start, start + length)
            alone = inputs.part(rows, [length], inputs.state[n : n + 1]).run(impl, dense=True)
            require_close(f"the output of sequence {n} ({impl})", packed.output[rows], alone.output)
            require_close(f"the final state of sequence {n} ({impl})", packed.final_state[n], alone.final_state[0])
            start += length


def _split(case: Case) -> None:
    inputs = draw(case)
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.tensors.items()}
    inputs = inputs.with_tensors(leaves)
    generator = torch.Generator().manual_seed(case.seed)
    first_rows, second_rows, firsts, seconds = [torch.arange(0)], [torch.arange(0)], [], []
    start = 0
    for length in inputs.lengths:
        cut = int(torch.randint(0, length + 1, (), generator=generator))
        first_rows.append(torch.arange(start, start + cut))
        second_rows.append(torch.arange(start + cut, start + length))
        firsts.append(cut)
        seconds.append(length - cut)
        start += length
    rows = torch.cat([*first_rows, *second_rows])
    for impl in impls(inputs.rule):
        first = inputs.part(torch.cat(first_rows), firsts, inputs.state).run(impl)
        second = inputs.part(torch.cat(second_rows), seconds, first.final_state).run(impl)
        output = torch.cat((first.output, second.output))[rows.argsort()]
        split = differentiate(Run(output, second.final_state), leaves)
        try:
            require_all_close(split, gradients(inputs, impl))
        except Violation as violation:
            raise Violation(f"{impl}, first {firsts} tokens and then {seconds}: {violation}") from None


def _causal(case: Case) -> None:
    inputs = draw(case)
    total = sum(case.lengths)
    if total < 2:
        return
    generator = torch.Generator().manual_seed(case.seed)
    cut = int(torch.randint(1, total, (), generator=generator))
    owner = torch.arange(len(case.lengths)).repeat_interleave(torch.tensor(case.lengths))
    for impl in impls(inputs.rule):
        leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.by_token.items()}
        run = inputs.with_tensors(leaves).run(impl)
        earlier = run.output[:cut]
        grads = torch.autograd.grad(earlier.square().sum(), list(leaves.values()), allow_unused=True)
        for name, grad in zip(leaves, grads, strict=True):
            if grad is not None:
                require_zero(f"gradient of outputs before token {cut} for {name} from it on ({impl})", grad[cut:])
        last = owner == owner[-1]
        if bool(last.all()):
            changed = dict(inputs.by_token)
        else:
            # Another sequence is no past either: its tokens reach nothing here.
            grads = torch.autograd.grad(
                inputs.with_tensors(leaves).run(impl).output[last].square().sum(),
                list(leaves.values()),
                allow_unused=True,
            )
            for name, grad in zip(leaves, grads, strict=True):
                if grad is not None:
                    require_zero(
                        f"gradient of the last sequence's outputs for {name} of the others ({impl})", grad[~last]
                    )
            changed = dict(inputs.by_token)
        for name, x in changed.items():
            # Half of a log decay or a beta is one too.
            changed[name] = torch.cat((x[:cut], 0.5 * x[cut:]))
        moved = inputs.with_tensors(changed).run(impl).output[:cut]
        require_close(f"the output before the changed token {cut} ({impl})", moved, run.output[:cut], CAUSAL)


def _idle(case: Case) -> None:
    inputs = draw(case, as_tokens=True)
    form = inputs.rule.form
    assert form is not None
    idle = {"log_decay": 0.0, "k" if form.erase is Erase.NONE else "beta": 0.0}
    tensors = {name: torch.full_like(x, idle[name]) for name, x in inputs.tensors.items() if name in idle}
    idle_inputs = inputs.with_tensors(tensors)
    for impl in impls(inputs.rule):
        require_same_bits(f"the final state ({impl})", idle_inputs.run(impl).final_state, inputs.state)


def _linear(case: Case) -> None:
    inputs = draw(case, as_tokens=True)
    other = {"v": case.randn(*inputs.by_token["v"].shape, stream=101), "initial_state": 2 * inputs.state}
    both = {name: 3 * inputs.tensors[name] - 2 * x for name, x in other.items()}
    for impl in impls(inputs.rule):
        runs = [inputs.with_tensors(tensors).run(impl) for tensors in ({}, other, both)]
        for name, one, two, combined in zip(Run._fields, *runs, strict=True):
            require_close(f"the {name} ({impl})", combined, 3 * one - 2 * two)


def _empty(case: Case) -> None:
    inputs = draw(case, as_tokens=True)
    # Empty sequences on both sides of each of the case's own.
    lengths = [0, *(x for length in case.lengths for x in (length, 0))]
    states = torch.cat((inputs.state, case.randn(len(lengths), *inputs.state.shape[1:], stream=102)))
    own = torch.arange(len(case.lengths))
    places = torch.arange(len(lengths))
    source = torch.where(places % 2 == 1, (places // 2).clamp_max(max(len(own) - 1, 0)), len(own) + places)
    widened = inputs.part(torch.arange(sum(case.lengths)), lengths, states[source])
    for impl in impls(inputs.rule):
        run = widened.run(impl)
        empty = torch.tensor(lengths) == 0
        require_same_bits(
            f"the final state of a sequence without tokens ({impl})", run.final_state[empty], widened.state[empty]
        )
        require_close(f"the output beside empty sequences ({impl})", run.output, inputs.run(impl).output)


def _value_heads(case: Case) -> None:
    inputs = draw(case, as_tokens=True)
    heads = inputs.by_token["v"].shape[1]
    repeated = {
        name: inputs.by_token[name].repeat_interleave(heads // inputs.by_token[name].shape[1], 1) for name in ("q", "k")
    }
    for impl in impls(inputs.rule):
        run, whole = inputs.run(impl), inputs.with_tensors(repeated).run(impl)
        for name, got, expected in zip(Run._fields, run, whole, strict=True):
            require_close(f"the {name} ({impl})", got, expected)


SCAN_LAWS: tuple[Law, ...] = (
    Law(
        "chunked-equals-recurrent",
        "the chunked form gives the outputs, final state and gradients of the step, to 1e-10 in float64",
        _chunked,
        has_form,
    ),
    Law("dense-equals-packed", "a batch of equally long sequences gives what they give packed", _dense),
    Law("packed-equals-separate", "packed sequences give what each gives alone", _separate),
    Law(
        "split-equals-whole",
        "cut anywhere and continued from the carried state, the outputs, state and gradients are those of the whole",
        _split,
    ),
    Law(
        "causal",
        "no output depends on a later token or on another sequence: that gradient is exactly 0, and a change of a later "
        "token moves no earlier output",
        _causal,
    ),
    Law(
        "idle-token-keeps-state",
        "with decay 1 and strength 0 (k = 0, or beta = 0 with the erase) the state keeps its bits",
        _idle,
        has_form,
    ),
    Law("empty-sequence-keeps-state", "a sequence without tokens keeps its state, bit for bit", _empty),
    Law("linear-in-values", "outputs and final state are linear in (v, initial state)", _linear, has_form),
    Law("shared-keys-equal-repeated", "value heads that share a key head equal the key head repeated", _value_heads),
)
