"""The tensors of a case: what a rule makes of random projections, or draws from the whole range of its recurrence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.rules.base import Tokens, UpdateRule
from linear_moe.rules.scan import implementations, scan
from linear_moe.testing.laws import Case, seeded

SMALLEST_DECAY = 1e-6
"""A token."""
_GATES = ("log_decay", "beta")


class Run(NamedTuple):
    """What a recurrence gives for some inputs."""

    output: Tensor
    """`[S, H, V]`"""
    final_state: Tensor
    """`[N, H, K, V]`"""


@dataclass(frozen=True)
class Inputs:
    """Everything a recurrence's result depends on, as tensors by name that can be cut, changed and differentiated."""

    rule: UpdateRule
    through_rule: bool
    """Whether the tensors are raw projections, which go through `rule.tokens` and `rule.output`, or tokens already."""
    by_token: Mapping[str, Tensor]
    """`[S, ...]` one row a token, the sequences one after another."""
    shared: Mapping[str, Tensor]
    """What all tokens share: parameters, a decay a head."""
    positions: Tensor
    """`[S]` of each token in its sequence."""
    lengths: tuple[int, ...]
    state: Tensor
    """`[N, H, K, V]` where each sequence starts."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name: what a gradient can be asked for."""
        return {**self.by_token, **self.shared, "initial_state": self.state}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Inputs:
        """The same with other tensors of the same names; those not named stay."""
        return replace(
            self,
            by_token={name: tensors.get(name, x) for name, x in self.by_token.items()},
            shared={name: tensors.get(name, x) for name, x in self.shared.items()},
            state=tensors.get("initial_state", self.state),
        )

    def part(self, rows: Tensor, lengths: Sequence[int], state: Tensor) -> Inputs:
        """Only the tokens `rows`, as sequences of `lengths` that start from `state`."""
        return replace(
            self,
            by_token={name: x[rows] for name, x in self.by_token.items()},
            positions=self.positions[rows],
            lengths=tuple(lengths),
            state=state,
        )

    def tokens(self) -> Tokens:
        """What the recurrence sees: `[1, S, ...]`."""
        named = {name: x[None] for name, x in self.by_token.items()}
        if self.through_rule:
            return self.rule.tokens(named, self._parameters(), self.positions[None])
        named |= self.shared
        extras = {name: named.pop(name) for name in list(named) if name not in Tokens._fields}
        return Tokens(**named, extras=extras)

    def run(self, impl: str, *, dense: bool = False) -> Run:
        """Run the recurrence over the packed sequences, or as a dense batch if they are equally long and it is asked."""
        tokens = self.tokens()
        rows = (len(self.lengths), self.lengths[0]) if dense else (1, sum(self.lengths))
        if dense:
            tokens = _reshape(tokens, rows)
        result = scan(
            tokens,
            form=self.rule.form,
            step=self.rule.step,
            scale=self.rule.scale,
            state_shape=self.rule.state_shape(),
            initial_state=self.state,
            cu_seqlens=None if dense else torch.tensor([0, *self.lengths]).cumsum(0),
            return_final_state=True,
            impl=impl,
        )
        assert result.final_state is not None
        output = result.output
        if self.through_rule:
            output = self.rule.output(output, tokens, self._parameters(rows))
        return Run(output.flatten(0, 1), result.final_state)

    def _parameters(self, rows: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """As a layer passes them: one for all tokens, or a row a token if it is per memory."""
        declared = self.rule.parameters()
        rows = rows or (1, sum(self.lengths))
        return {name: x.expand(*rows, *x.shape) if declared[name].per_memory else x for name, x in self.shared.items()}


def _reshape(tokens: Tokens, rows: tuple[int, int]) -> Tokens:
    """`[1, S, ...]` to `[B, T, ...]`; a decay a head stays."""

    def change(x: Tensor) -> Tensor:
        return x if x.dim() == 1 else x[0].unflatten(0, rows)

    changed = {name: change(x) for name, x in tokens._asdict().items() if isinstance(x, Tensor)}
    return Tokens(**changed, extras={name: change(x) for name, x in tokens.extras.items()})


def draw(case: Case, dtype: torch.dtype = torch.float64, *, as_tokens: bool = False) -> Inputs:
    """The inputs of a case.

    Args:
        case: what to draw.
        dtype: of projections, or of q, k and v. Gates and states have at least float32.
        as_tokens: put what the rule makes of its projections in their place: only the recurrence is then under test.
    """
    rule = case.build()
    total, wide = sum(case.lengths), torch.promote_types(dtype, torch.float32)
    raw = {}
    for stream, (name, spec) in enumerate(rule.projections().items()):
        x = case.randn(total, spec.width, stream=stream)
        raw[name] = (F.silu(x) if spec.activation == "silu" else x).to(dtype)
    with seeded(case.seed):
        parameters = {name: spec.init(spec.shape).to(wide) for name, spec in rule.parameters().items()}
    heads = rule.dims.num_value_heads
    positions = [torch.arange(length) for length in case.lengths]
    inputs = Inputs(
        rule=rule,
        through_rule=True,
        by_token=raw,
        shared=parameters,
        positions=torch.cat([torch.arange(0), *positions]),
        lengths=case.lengths,
        state=case.randn(len(case.lengths), heads, *rule.state_shape(), stream=100, dtype=wide),
    )
    if case.tokens == "rule" and not as_tokens:
        return inputs
    tokens = inputs.tokens()
    if case.tokens != "rule":
        tokens = _redraw(case, tokens)
    named = {name: x for name, x in tokens._asdict().items() if isinstance(x, Tensor)} | dict(tokens.extras)
    if dtype == torch.float64:
        # A gate that a rule makes in float32 whatever its input would bring its rounding into gradients.
        named = {name: x.double() for name, x in named.items()}
    return replace(
        inputs,
        through_rule=False,
        by_token={name: x[0].detach() for name, x in named.items() if x.dim() > 1},
        shared={name: x.detach() for name, x in named.items() if x.dim() == 1},
    )


def _redraw(case: Case, tokens: Tokens) -> Tokens:
    """Keys of norm 1 and gates from their whole range, or from its ends."""
    extreme = case.tokens == "extreme"
    generator = torch.Generator().manual_seed(case.seed)
    k = torch.randn(tokens.k.shape, generator=generator, dtype=torch.float64)
    if extreme:
        direction = torch.randn(tokens.k.shape[-2:], generator=generator, dtype=torch.float64)
        k = direction + 1e-3 * k
    changed: dict[str, Any] = {"k": F.normalize(k, dim=-1).to(tokens.k.dtype)}
    for name in _GATES:
        gate = getattr(tokens, name)
        if gate is not None:
            uniform = torch.rand(gate.shape, generator=generator, dtype=torch.float64)
            redrawn = _decays(uniform, extreme) if name == "log_decay" else _strengths(uniform, extreme)
            changed[name] = redrawn.to(gate.dtype)
    return tokens._replace(**changed)


def _decays(uniform: Tensor, extreme: bool) -> Tensor:
    """Log decays in [log 1e-6, 0], as many slow as fast; a fifth exactly 0."""
    strongest = -torch.tensor(SMALLEST_DECAY, dtype=torch.float64).log()
    if extreme:
        return torch.where(uniform < 0.5, 0, -strongest)
    log_decay = -strongest * torch.exp(-12 * uniform)
    return torch.where(uniform > 0.8, 0, log_decay)


def _strengths(uniform: Tensor, extreme: bool) -> Tensor:
    """Betas in [0, 2]."""
    return (3 * uniform).floor() if extreme else 2 * uniform


def gradients(inputs: Inputs, impl: str, *, dense: bool = False) -> dict[str, Tensor]:
    """The run's output and final state, and the gradient of a random function of both for every input, by name."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.tensors.items()}
    return differentiate(inputs.with_tensors(leaves).run(impl, dense=dense), leaves)


def differentiate(run: Run, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A run's tensors and their gradients for `leaves`, 0 for a leaf that nothing depends on."""
    results = {"output": run.output, "final_state": run.final_state}
    total = torch.zeros((), dtype=torch.float64)
    for stream, x in enumerate(results.values()):
        generator = torch.Generator().manual_seed(stream)
        total = total + (torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) * x).sum()
    grads: list[Tensor | None] = [None] * len(leaves)
    if total.requires_grad:
        grads = [*torch.autograd.grad(total, list(leaves.values()), allow_unused=True)]
    named = dict(zip(leaves, grads, strict=True))
    measured = {name: x.detach() for name, x in results.items()}
    return measured | {
        f"gradient of {name}": torch.zeros_like(leaves[name]) if grad is None else grad for name, grad in named.items()
    }


def impls(rule: UpdateRule) -> tuple[str, ...]:
    """The implementations this rule has on a CPU."""
    return tuple(impl for impl in implementations(rule.form) if impl != "triton")


def has_form(rule: type[UpdateRule]) -> bool:
    """Whether the rule declares a form, which a law of forms speaks of."""
    return rule.form is not None
