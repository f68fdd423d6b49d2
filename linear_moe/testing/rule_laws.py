"""The laws of a rule and of every implementation of its recurrence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from linear_moe.forms import Decay, Erase, Recurrence
from linear_moe.rules.base import Tokens, UpdateRule
from linear_moe.testing.budget import error_budget
from linear_moe.testing.laws import (
    Case,
    Law,
    Violation,
    require,
    require_all_close,
    require_close,
    require_finite,
    require_same_bits,
    require_zero,
)
from linear_moe.testing.rule_inputs import Inputs, Run, differentiate, draw, gradients, impls

CAUSAL = 1e-12
"""How far a change of a later token may move an earlier float64 output, by rounding alone."""


def _has_form(rule: type[UpdateRule]) -> bool:
    return rule.form is not None


# --- what the rule says of its tokens -------------------------------------------------------------------------------


def _check_tokens(case: Case) -> None:
    rule = case.build()
    dims = rule.dims
    rows, columns = rule.state_shape()
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        inputs = draw(replace(case, tokens="rule"), dtype)
        # A hundred standard deviations: saturated gates, as a training run that goes wrong makes them.
        for magnitude in (1.0, 100.0):
            scaled = {name: x * magnitude for name, x in inputs.by_token.items()}
            tokens = inputs.with_tensors(scaled).tokens()
            where = f"of {str(dtype).removeprefix('torch.')} projections"
            leading = (1, sum(case.lengths))
            for name, width in (("q", rows), ("k", rows), ("v", columns)):
                x = getattr(tokens, name)
                require_finite(f"{name} {where}", x)
                heads = dims.num_value_heads if name == "v" else x.shape[2]
                if rule.form is None:
                    width = x.shape[-1]
                _require_shape(f"{name} {where}", x, (*leading, heads, width))
            if tokens.log_decay is not None:
                _require_wide(f"log_decay {where}", tokens.log_decay)
                largest = float(tokens.log_decay.max()) if tokens.log_decay.numel() else 0.0
                require(largest <= 0, f"log_decay {where} is {largest:.6g}, expected at most 0")
            if tokens.beta is not None:
                _require_wide(f"beta {where}", tokens.beta)
                _require_shape(f"beta {where}", tokens.beta, (*leading, dims.num_value_heads))
            if rule.form is not None:
                _require_gates(rule.form, tokens, where)


def _require_wide(name: str, gate: Tensor) -> None:
    require_finite(name, gate)
    require(
        gate.dtype in (torch.float32, torch.float64), f"{name} is {gate.dtype}, expected float32, or float64"
    )


def _require_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    require(tuple(x.shape) == shape, f"{name} has shape {list(x.shape)}, expected {list(shape)}")


def _require_gates(form: Recurrence, tokens: Tokens, where: str) -> None:
    """The gates that the form declares, and no others."""
    batch, length, heads, _ = tokens.v.shape
    decays: dict[Decay, tuple[int, ...] | None] = {
        Decay.NONE: None,
        Decay.HEAD: (heads,),
        Decay.SCALAR: (batch, length, heads),
        Decay.VECTOR: (batch, length, heads, tokens.k.shape[-1]),
    }
    strengths: dict[Erase, tuple[int, ...] | None] = {Erase.NONE: None, Erase.DELTA: (batch, length, heads)}
    for name, gate, shape in (
        ("log_decay", tokens.log_decay, decays[form.decay]),
        ("beta", tokens.beta, strengths[form.erase]),
    ):
        got = None if gate is None else tuple(gate.shape)
        require(
            got == shape,
            f"{name} {where} {'is missing' if got is None else f'has shape {list(got)}'}, while the declared form "
            f"({form}) {'takes none' if shape is None else f'takes {list(shape)}'}",
        )


# --- what the step does ---------------------------------------------------------------------------------------------


def _steps(inputs: Inputs) -> tuple[list[Tokens], Tensor]:
    """Each token as `step` takes it, `[1, H, *]`, and the sequence each is of."""
    tokens = inputs.tokens()
    heads = tokens.v.shape[2]
    shared_by = heads // tokens.q.shape[2]
    decay = tokens.log_decay
    if decay is not None:
        decay = decay.double().expand(1, sum(inputs.lengths), heads) if decay.dim() == 1 else decay.double()
        decay = decay[..., None] if decay.dim() == 3 else decay
    steps = []
    for t in range(sum(inputs.lengths)):
        steps.append(
            Tokens(
                q=tokens.q[:, t].double().repeat_interleave(shared_by, 1) * inputs.rule.scale,
                k=tokens.k[:, t].double().repeat_interleave(shared_by, 1),
                v=tokens.v[:, t].double(),
                log_decay=None if decay is None else decay[:, t],
                beta=None if tokens.beta is None else tokens.beta[:, t].double(),
                extras={name: x[:, t].double() for name, x in tokens.extras.items()},
            )
        )
    owner = torch.arange(len(inputs.lengths)).repeat_interleave(torch.tensor(inputs.lengths))
    return steps, owner


def _form_step(form: Recurrence, state: Tensor, token: Tokens) -> tuple[Tensor, Tensor]:
    """The form's definition, number by number, for one token `[1, H, *]`."""
    if token.log_decay is not None:
        state = torch.einsum("nhk,nhkv->nhkv", token.log_decay.exp().expand_as(token.k), state)
    write = token.v
    if form.erase is Erase.DELTA:
        assert token.beta is not None
        write = token.beta[..., None] * (token.v - torch.einsum("nhk,nhkv->nhv", token.k, state))
    state = state + torch.einsum("nhk,nhv->nhkv", token.k, write)
    return state, torch.einsum("nhk,nhkv->nhv", token.q, state)


def _check_step(case: Case) -> None:
    inputs = draw(case, as_tokens=True)
    states, outputs = list(inputs.state.split(1)), []
    for token, sequence in zip(*_steps(inputs), strict=True):
        before = states[int(sequence)]
        given = before.clone()
        state, read = inputs.rule.step(before, token)
        require_same_bits("the state that step was given, after the call,", before, given)
        require(state.dtype == read.dtype == torch.float64, f"step in float64 gave {state.dtype} and {read.dtype}")
        states[int(sequence)] = state
        outputs.append(read[0])
    run = inputs.run("recurrent")
    require_close("the final state of the recurrent form", run.final_state, torch.cat([*states, inputs.state[:0]]))
    if outputs:
        require_close("the output of the recurrent form", run.output, torch.stack(outputs))


def _check_form(case: Case) -> None:
    inputs = draw(case, as_tokens=True)
    form, state = inputs.rule.form, inputs.state[:1]
    assert form is not None
    for place, token in enumerate(_steps(inputs)[0]):
        expected_state, expected_read = _form_step(form, state, token)
        new, read = inputs.rule.step(state, token)
        for name, got, expected in (("state", new, expected_state), ("read", read, expected_read)):
            try:
                require_close(f"the {name} after token {place}", got, expected)
            except Violation as violation:
                raise Violation(
                    f"step contradicts the declared form ({form}): {violation}, where expected is the form's"
                ) from None
        state = expected_state


# --- every implementation gives what the step gives -----------------------------------------------------------------


def _check_chunked(case: Case) -> None:
    inputs = draw(case)
    require_all_close(gradients(inputs, "chunked"), gradients(inputs, "recurrent"))


def _check_dense(case: Case) -> None:
    if len(set(case.lengths)) != 1:
        return
    inputs = draw(case)
    for impl in impls(inputs.rule):
        require_all_close(gradients(inputs, impl, dense=True), gradients(inputs, impl))


def _check_separate(case: Case) -> None:
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


def _check_split(case: Case) -> None:
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


def _check_causal(case: Case) -> None:
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


# --- laws of the recurrence -----------------------------------------------------------------------------------------


def _check_idle(case: Case) -> None:
    inputs = draw(case, as_tokens=True)
    form = inputs.rule.form
    assert form is not None
    idle = {"log_decay": 0.0, "k" if form.erase is Erase.NONE else "beta": 0.0}
    tensors = {name: torch.full_like(x, idle[name]) for name, x in inputs.tensors.items() if name in idle}
    idle_inputs = inputs.with_tensors(tensors)
    for impl in impls(inputs.rule):
        require_same_bits(f"the final state ({impl})", idle_inputs.run(impl).final_state, inputs.state)


def _check_linear(case: Case) -> None:
    inputs = draw(case, as_tokens=True)
    other = {"v": case.randn(*inputs.by_token["v"].shape, stream=101), "initial_state": 2 * inputs.state}
    both = {name: 3 * inputs.tensors[name] - 2 * x for name, x in other.items()}
    for impl in impls(inputs.rule):
        runs = [inputs.with_tensors(tensors).run(impl) for tensors in ({}, other, both)]
        for name, one, two, combined in zip(Run._fields, *runs, strict=True):
            require_close(f"the {name} ({impl})", combined, 3 * one - 2 * two)


def _check_empty(case: Case) -> None:
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


def _check_value_heads(case: Case) -> None:
    inputs = draw(case, as_tokens=True)
    heads = inputs.by_token["v"].shape[1]
    repeated = {
        name: inputs.by_token[name].repeat_interleave(heads // inputs.by_token[name].shape[1], 1) for name in ("q", "k")
    }
    for impl in impls(inputs.rule):
        run, whole = inputs.run(impl), inputs.with_tensors(repeated).run(impl)
        for name, got, expected in zip(Run._fields, run, whole, strict=True):
            require_close(f"the {name} ({impl})", got, expected)


# --- numbers --------------------------------------------------------------------------------------------------------


def _check_finite(case: Case) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        inputs = draw(case, dtype)
        for impl in impls(inputs.rule):
            for name, x in gradients(inputs, impl).items():
                require_finite(f"{name} ({impl}, {str(dtype).removeprefix('torch.')})", x)


def _check_budget(dtype: torch.dtype) -> Callable[[Case], None]:
    def check(case: Case) -> None:
        inputs = draw(case, dtype, as_tokens=True)
        candidate, reference = gradients(inputs, "chunked"), gradients(inputs, "recurrent")
        exact = gradients(_in_float64(inputs), "recurrent")
        require(
            candidate["output"].dtype == dtype and candidate["final_state"].dtype == torch.float32,
            f"output and final state are {candidate['output'].dtype} and {candidate['final_state'].dtype}, expected "
            f"{dtype} (that of v) and torch.float32",
        )
        over = [str(budget) for budget in error_budget(candidate, reference, exact, dtype) if not budget.holds]
        require(not over, "; ".join(over))

    return check


def _in_float64(inputs: Inputs) -> Inputs:
    """The same numbers."""
    return inputs.with_tensors({name: x.double() for name, x in inputs.tensors.items()})


def _check_strides(case: Case) -> None:
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


def _check_autocast(case: Case) -> None:
    inputs = draw(case, torch.float32, as_tokens=True)
    for impl in impls(inputs.rule):
        expected = gradients(inputs, impl)
        with torch.autocast("cpu", torch.bfloat16):
            got = gradients(inputs, impl)
        for name, x in got.items():
            require_same_bits(f"{name} ({impl})", x, expected[name])


def _check_gradients(case: Case) -> None:
    inputs = draw(case, as_tokens=True)
    names = [name for name, x in inputs.tensors.items() if x.numel()]
    leaves = [inputs.tensors[name].double().requires_grad_() for name in names]
    for impl in impls(inputs.rule):

        def function(*tensors: Tensor, impl: str = impl) -> tuple[Tensor, ...]:
            return tuple(inputs.with_tensors(dict(zip(names, tensors, strict=True))).run(impl))

        try:
            torch.autograd.gradcheck(function, leaves)
        except torch.autograd.gradcheck.GradcheckError as error:  # type: ignore[attr-defined]
            raise Violation(f"gradcheck of {', '.join(names)} ({impl}): {error}") from None


RULE_LAWS: tuple[Law, ...] = (
    Law(
        "tokens_in_range",
        "a rule's tokens are finite and of the declared shapes; log_decay is at most 0, and gates are float32 or better",
        _check_tokens,
    ),
    Law(
        "step_is_declared_form",
        "the step does what the declared form says: S' = Diag(a) S, S = S' + k (v or beta (v - S'^T k))^T, o = q^T S",
        _check_form,
        _has_form,
    ),
    Law(
        "recurrent_is_step",
        "the step runs in float64, leaves its arguments alone, and taken token by token gives the recurrent form",
        _check_step,
    ),
    Law(
        "chunked_equals_recurrent",
        "the chunked form gives the outputs, final state and gradients of the step, to 1e-10 in float64",
        _check_chunked,
        _has_form,
    ),
    Law("dense_equals_packed", "a batch of equally long sequences gives what they give packed", _check_dense),
    Law("packed_equals_separate", "packed sequences give what each gives alone", _check_separate),
    Law(
        "split_equals_whole",
        "cut anywhere and continued from the carried state, the outputs, state and gradients are those of the whole",
        _check_split,
    ),
    Law(
        "causal",
        "no output depends on a later token or on another sequence: that gradient is exactly 0, and a change of a later "
        "token moves no earlier output",
        _check_causal,
    ),
    Law(
        "idle_token_keeps_state",
        "with decay 1 and strength 0 (k = 0, or beta = 0 with the erase) the state keeps its bits",
        _check_idle,
        _has_form,
    ),
    Law("empty_sequence_keeps_state", "a sequence without tokens keeps its state, bit for bit", _check_empty),
    Law("linear_in_values", "outputs and final state are linear in (v, initial state)", _check_linear, _has_form),
    Law("shared_keys_equal_repeated", "value heads that share a key head equal the key head repeated", _check_value_heads),
    Law("finite", "finite inputs give finite outputs, states and gradients, for decays from 1 to 1e-6 a token", _check_finite),
    Law("float32_budget", "chunked float32 errs within its error budget", _check_budget(torch.float32), _has_form),
    Law("bfloat16_budget", "chunked bfloat16 errs within its error budget", _check_budget(torch.bfloat16), _has_form),
    Law("strides_do_not_matter", "non-contiguous inputs give the same results", _check_strides),
    Law("autocast_does_not_matter", "an op under autocast gives the bits it gives without", _check_autocast),
    Law(
        "gradients_are_derivatives",
        "gradients are the derivatives (gradcheck at its default settings)",
        _check_gradients,
        max_tokens=6,
    ),
)
"""In the order in which a broken rule is best told what is wrong with it."""
