"""What a rule declares of its tokens and its form, held against what they are and what its step does."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from linear_moe.forms import Decay, Erase, Recurrence
from linear_moe.rules.base import Tokens, UpdateRule
from linear_moe.rules.transforms import l2_norm
from linear_moe.testing.laws import Case, Law, Violation, require, require_close, require_finite, require_same_bits
from linear_moe.testing.rule_inputs import Inputs, draw, has_form


def _tokens(case: Case) -> None:
    rule = case.build()
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        where = f"of {str(dtype).removeprefix('torch.')} projections"
        inputs = draw(replace(case, tokens="rule"), dtype)
        tokens, again = inputs.tokens(), inputs.tokens()
        for name, x in _named(tokens).items():
            require_finite(f"{name} {where}", x)
            require_same_bits(f"{name} {where}, made again,", _named(again)[name], x)
        _require_shapes(rule, tokens, (1, sum(case.lengths)), where)
        _require_gates(tokens, where)
        if rule.normalizes_qk:
            for name in ("q", "k"):
                heads = inputs.by_token[name].unflatten(-1, (rule.dims.num_heads, rule.dims.head_dim))
                require_same_bits(
                    f"{name} {where} of a rule that normalizes_qk", _named(tokens)[name], l2_norm(heads)[None]
                )
        # A hundred standard deviations: saturated gates, as a training run that goes wrong makes them.
        large = {name: 100 * x for name, x in inputs.by_token.items()}
        _require_gates(inputs.with_tensors(large).tokens(), f"{where} a hundred times as large")


def _named(tokens: Tokens) -> dict[str, Tensor]:
    return {name: x for name, x in tokens._asdict().items() if isinstance(x, Tensor)} | dict(tokens.extras)


def _require_shapes(rule: UpdateRule, tokens: Tokens, leading: tuple[int, int], where: str) -> None:
    """The tokens fit the rule's sizes and, if it declares a form, the state's and the form's gates."""
    heads = rule.dims.num_value_heads
    keys, values = (tokens.k.shape[-1], tokens.v.shape[-1]) if rule.form is None else rule.state_shape()
    _require_shape(f"v {where}", tokens.v, (*leading, heads, values))
    for name, x in (("q", tokens.q), ("k", tokens.k)):
        _require_shape(f"{name} {where}", x, (*leading, x.shape[2], keys))
        require(heads % x.shape[2] == 0, f"{name} {where} has {x.shape[2]} heads, which don't divide the {heads} of v")
    if rule.form is not None:
        _require_form(rule.form, tokens, where)


def _require_gates(tokens: Tokens, where: str) -> None:
    for name, gate in (("log_decay", tokens.log_decay), ("beta", tokens.beta)):
        if gate is not None:
            _require_wide(f"{name} {where}", gate)
    if tokens.log_decay is not None and tokens.log_decay.numel():
        largest = float(tokens.log_decay.detach().max())
        require(largest <= 0, f"log_decay {where} is {largest:.6g}, expected at most 0")


def _require_wide(name: str, gate: Tensor) -> None:
    require_finite(name, gate)
    require(gate.dtype in (torch.float32, torch.float64), f"{name} is {gate.dtype}, expected float32, or float64")


def _require_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    require(tuple(x.shape) == shape, f"{name} has shape {list(x.shape)}, expected {list(shape)}")


def _require_form(form: Recurrence, tokens: Tokens, where: str) -> None:
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
    return steps, torch.arange(len(inputs.lengths)).repeat_interleave(torch.tensor(inputs.lengths))


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


def _step(case: Case) -> None:
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
    require_close("the final state of the recurrent form", run.final_state, torch.cat(states))
    if outputs:
        require_close("the output of the recurrent form", run.output, torch.stack(outputs))


def _form(case: Case) -> None:
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


DECLARATION_LAWS: tuple[Law, ...] = (
    Law(
        "tokens-in-range",
        "a rule's tokens are finite, of the declared shapes and the same each time; log_decay is at most 0, and gates are "
        "float32 or better",
        _tokens,
    ),
    Law(
        "recurrent-is-step",
        "the step runs in float64, leaves its arguments alone, and taken token by token gives the recurrent form",
        _step,
    ),
    Law(
        "step-is-declared-form",
        "the step does what the declared form says: S' = Diag(a) S, S = S' + k (v or beta (v - S'^T k))^T, o = q^T S",
        _form,
        has_form,
    ),
)
