"""What a layer of one memory and a mixture of many have in common: the pipeline from tokens to the output.

x -> slots sorted by (memory, sequence) -> projections -> short conv along each segment -> gates -> the rule's scan
  -> weighted sum of a token's slots -> gated norm -> output projection
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, NamedTuple, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linear_moe.layers.checks import check_input, check_state
from linear_moe.layers.decode_steps import decode_token, decodes, plan_decoding
from linear_moe.layers.gate_parameters import GateParameters
from linear_moe.layers.kernel_steps import (
    LARGEST_HEAD,
    combines,
    conv_parts,
    conv_runs,
    gates_are_declared,
    gates_of,
    kernels_run,
    made_together,
    made_tokens,
    normed_by_conv,
    plan_of,
)
from linear_moe.layers.norms import GatedRMSNorm
from linear_moe.layers.projections import (
    grouped_linear,
    xavier_init_,
)
from linear_moe.layers.routing import SlotPlan, slots_of_batch, sort_slots
from linear_moe.layers.sequences import Sequences, describe_sequences
from linear_moe.layers.short_conv import activate, short_conv
from linear_moe.layers.slot_projections import project_and_convolve
from linear_moe.layers.slots import gather_tokens, scatter_slots
from linear_moe.layers.state import MemoryState
from linear_moe.rules.base import RuleDims, RuleOutput, Tokens, UpdateRule, upcast
from linear_moe.rules.registry import get_rule
from linear_moe.rules.scan import IMPLS, check_form, scan_segments, without_batch
from linear_moe.rules.segments import Segments, segments_of
from linear_moe.rules.validate import check_count

CONV_SCOPES = ("memory", "sequence")
PROJECTION_SCOPES = ("memory", "shared")


class Assignment(NamedTuple):
    """Which memories the S tokens of a call use, and how much of each read they take."""

    memory: Tensor
    """`[S, F]` int64 the memories of each token."""
    weights: Tensor | None
    """`[S, F]` float32, or None for a weight of 1."""
    tokens: Tensor
    """`[S, D]` the same tokens, for what comes after."""
    shared: bool = False
    """Whether the last memory is the last of every token's."""


class RecurrentMixer(nn.Module, ABC):
    """The common body. Subclasses say which memories a token uses, by `_assign`."""

    def __init__(
        self,
        hidden_size: int,
        rule: str | type[UpdateRule],
        *,
        num_states: int,
        num_heads: int,
        head_dim: int,
        head_value_dim: int | None,
        num_value_heads: int | None,
        conv_width: int,
        conv_scope: str,
        norm_eps: float,
        layer_index: int,
        num_layers: int,
        rule_options: Mapping[str, Any] | None,
        impl: str,
        memory_projections: str,
        query_projection: str,
        learned_initial_memory: bool,
        output_gate: str,
        norm_groups: int | None,
        gate_before_norm: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        if conv_scope not in CONV_SCOPES:
            raise ValueError(f"conv_scope must be one of {', '.join(CONV_SCOPES)}, got {conv_scope!r}")
        for name, value in (("memory_projections", memory_projections), ("query_projection", query_projection)):
            if value not in PROJECTION_SCOPES:
                raise ValueError(f"{name} must be one of {', '.join(PROJECTION_SCOPES)}, got {value!r}")
        check_count("conv_width", conv_width)
        if norm_eps < 0:
            raise ValueError(f"norm_eps must be at least 0, got {norm_eps}")
        if impl not in IMPLS:
            raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
        self.hidden_size = hidden_size
        self.num_states = num_states
        self.conv_scope = conv_scope
        self.conv_width = conv_width
        self.impl = impl
        self.layer_index = layer_index
        dims = RuleDims(
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_value_heads=num_heads if num_value_heads is None else num_value_heads,
            head_dim=head_dim,
            head_value_dim=head_dim if head_value_dim is None else head_value_dim,
            layer_index=layer_index,
            num_layers=num_layers,
        )
        self.rule = _build_rule(rule, dims, rule_options)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        declared = self.rule.projections()
        by_memory = {
            name: (memory_projections if spec.per_memory else query_projection) == "memory"
            for name, spec in declared.items()
        }
        self.memory_projections = {name: spec for name, spec in declared.items() if by_memory[name]}
        self.token_projections = {name: spec for name, spec in declared.items() if not by_memory[name]}
        # One fused matrix for all projections of a kind: one matmul, and the rows of a name are a slice of it. None without
        # rows: a parameter of no numbers gets no gradient, which data-parallel training waits for.
        memory_rows = sum(spec.first_width for spec in self.memory_projections.values())
        token_rows = sum(spec.first_width for spec in self.token_projections.values())
        shape = (num_states, memory_rows, hidden_size)
        self.memory_weight = nn.Parameter(torch.empty(shape, **factory)) if memory_rows else None
        self.token_weight = nn.Parameter(torch.empty(token_rows, hidden_size, **factory)) if token_rows else None
        self.second_stage = nn.ParameterDict()
        self.projection_bias = nn.ParameterDict()
        for name, spec in declared.items():
            stack = num_states if by_memory[name] else 1
            if spec.rank is not None:
                self.second_stage[name] = nn.Parameter(torch.empty(stack, spec.width, spec.rank, **factory))
            if spec.bias:
                self.projection_bias[name] = nn.Parameter(torch.empty(stack, spec.width, **factory))

        self.convolved = [] if conv_scope == "sequence" else [name for name, spec in declared.items() if spec.conv]
        self.activations = {name: spec.activation for name, spec in declared.items()}
        channels = hidden_size if conv_scope == "sequence" else sum(declared[name].width for name in self.convolved)
        biased = conv_scope == "memory" and any(declared[name].conv_bias for name in self.convolved)
        self.conv_weight = nn.Parameter(torch.empty(channels, conv_width, **factory)) if channels else None
        self.conv_bias = nn.Parameter(torch.empty(channels, **factory)) if biased else None

        normalizes = self.rule.normalizes_qk and dims.head_dim <= LARGEST_HEAD
        self.conv_parts = conv_parts(declared, self.convolved, conv_width, dims.head_dim, normalizes)
        """What the kernel of the convolution makes of each projection, or None where PyTorch does."""
        self.conv_norms = normed_by_conv(self.conv_parts)
        self.kernel_gates = gates_are_declared(self.rule, normalized=True)
        self.together = made_together(
            self.conv_parts,
            self.memory_projections,
            self.token_projections,
            self.rule.gate_forms() if self.kernel_gates and self.conv_norms else None,
            dims.num_value_heads,
        )
        self.conv_runs = conv_runs(self.conv_parts, self.together)

        self.gate_parameters = GateParameters(self.rule.parameters(), num_states, **factory)
        value_width = dims.num_value_heads * dims.head_value_dim
        self.initial_memory = (
            nn.Parameter(torch.empty(num_states, dims.num_value_heads, *self.rule.state_shape(), **factory))
            if learned_initial_memory
            else None
        )
        self.norm = GatedRMSNorm(
            dims.num_value_heads,
            dims.head_value_dim,
            norm_eps,
            gate=output_gate,
            groups=norm_groups,
            gate_first=gate_before_norm,
            **factory,
        )
        self.kernel_combines = combines(self.norm, dims.head_value_dim)
        gated = output_gate != "none"
        self.gate_proj = nn.Linear(hidden_size, value_width, bias=False, **factory) if gated else None
        self.out_proj = nn.Linear(value_width, hidden_size, bias=False, **factory)
        self.decoding = plan_decoding(self)
        """How one token is decoded in few launches, or None where it takes the path of many."""
        # The class as it was written: wrappers (of adapters, of sharded training) change the class of a built module.
        self._owner = f"{type(self).__name__} {layer_index} ({self.rule.name})"
        self._reset_own_parameters()

    def reset_parameters(self) -> None:
        """Initialise as published (2502.13685's code): Xavier of gain 2^-2.5 for every memory's every matrix."""
        self._reset_own_parameters()
        self.gate_parameters.reset_parameters()
        self.norm.reset_parameters()

    @torch.no_grad()
    def _reset_own_parameters(self) -> None:
        for weight, specs in (
            (self.memory_weight, self.memory_projections),
            (self.token_weight, self.token_projections),
        ):
            widths = [spec.first_width for spec in specs.values()]
            for part in () if weight is None else weight.split(widths, -2):
                xavier_init_(part)
        for weight in (*self.second_stage.values(), self.out_proj.weight):
            xavier_init_(weight)
        if self.gate_proj is not None:
            xavier_init_(self.gate_proj.weight)
        for bias in self.projection_bias.values():
            nn.init.zeros_(bias)
        # As a depthwise convolution is: uniform within 1 / sqrt(W).
        for parameter in (self.conv_weight, self.conv_bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -(self.conv_width**-0.5), self.conv_width**-0.5)
        if self.initial_memory is not None:
            nn.init.zeros_(self.initial_memory)

    @abstractmethod
    def _assign(self, tokens: Tensor, sequences: Sequences, kernel: bool) -> tuple[Assignment, Tensor | None]:
        """The memories of each token `[S, D]`, and the auxiliary loss of that choice; `kernel`: whether kernels run."""

    @abstractmethod
    def _attach(self, output: Tensor, loss: Tensor) -> Tensor:
        """The output with the auxiliary loss handed in."""

    def forward(
        self,
        x: Tensor,
        *,
        padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_length: int | None = None,
        state: MemoryState | None = None,
    ) -> Tensor:
        """Mix the tokens of each sequence, from the state if one is given.

        Args:
            x: `[B, T, D]`.
            padding_mask: `[B, T]` bool, true on real tokens; pads may stand anywhere, touch nothing and read 0.
            cu_seqlens: `[N + 1]` borders of packed documents, with B = 1. Not together with `padding_mask`.
            max_length: a bound on the tokens of a packed document, T unless given. Kernels then cut no document for being as
                long as the row. On a GPU it is taken on trust: looking would wait.
            state: from `new_state`, for B sequences or N documents. Updated in place without gradients; with gradients
                its tensors are replaced.

        Returns:
            `[B, T, D]` in the dtype of x.

        Raises:
            ValueError: naming the argument that does not fit.
        """
        sequences = describe_sequences(x, padding_mask, cu_seqlens, max_length)
        self._check(x, sequences, state)
        if sequences.num_sequences == 0:
            return torch.zeros_like(x)
        tokens = x.flatten(0, 1)
        if padding_mask is not None:
            tokens = torch.where(sequences.valid[:, None], tokens, 0)
        if decodes(self, x, cu_seqlens, state):
            assert state is not None
            valid = None if padding_mask is None else sequences.valid
            output, loss = decode_token(self, tokens, sequences, valid, state)
            output = output.to(x.dtype)[:, None]
            return output if loss is None else self._attach(output, loss)
        conv_state = None if state is None else state.conv
        if self.conv_scope == "sequence":
            tokens, conv_state = self._convolve_input(tokens, sequences, conv_state)

        kernels = kernels_run(x, self.impl)
        assignment, loss = self._assign(tokens, sequences, kernels)
        tokens = assignment.tokens
        fan_out = assignment.memory.shape[1]
        num_sequences = sequences.num_sequences
        num_segments = self.num_states * num_sequences
        # Without pads every slot is a memory's.
        covered = padding_mask is None and cu_seqlens is None
        if covered and self.num_states == 1:
            plan = slots_of_batch(x.shape[0], x.shape[1], x.device)
        elif kernels:
            plan = plan_of(assignment.memory, sequences, self.num_states)
        else:
            groups = assignment.memory * num_sequences + sequences.index[:, None]
            groups = torch.where(sequences.valid[:, None], groups, num_segments)
            plan = sort_slots(groups.flatten(), num_segments)

        cu_memories = plan.cu_seqlens[::num_sequences]
        normalized, gates, gate = False, None, None
        if kernels and self.conv_parts is not None:
            made = project_and_convolve(
                self, tokens, plan, cu_memories, fan_out, conv_state if self.convolved else None, covered,
                covered and assignment.shared,
            )  # fmt: skip
            raw, gates, gate = made.raw, made.gates, made.gate
            # Else it is of the layer's input.
            conv_state = made.conv_state if self.convolved else conv_state
            normalized = self.conv_norms
        else:
            raw = self._project(tokens, plan, cu_memories, fan_out, covered)
            if self.convolved:
                raw, conv_state = self._convolve(raw, plan, conv_state)
            raw = {name: activate(value, self.activations[name]) for name, value in raw.items()}
        parameters = self.gate_parameters.of_slots(lambda: self._memory_of_slots(plan, cu_memories)[None])
        segments = segments_of(1, plan.order.shape[0], plan.cu_seqlens, sequences.max_length, x.device)
        if normalized and self.kernel_gates:
            rule_tokens = made_tokens(self.rule, raw, *(gates or gates_of(self.rule, raw, parameters)))
            reads, final_state = self._scan(rule_tokens, segments, state, num_sequences, covered)
        else:
            raw = {name: value[None] for name, value in raw.items()}
            if normalized:
                rule_tokens = self.rule.normalized_tokens(raw, parameters)
            else:
                positions = sequences.position
                if state is not None:
                    positions = positions + state.tokens_seen[sequences.index.clamp_max(num_sequences - 1)]
                slot_positions = positions if plan.identity else positions[plan.order // fan_out]
                rule_tokens = self.rule.tokens(raw, parameters, slot_positions[None])
            if self.rule.form is not None:
                check_form(self.rule.form, rule_tokens)
            reads, final_state = self._scan(without_batch(rule_tokens), segments, state, num_sequences, covered)
            # Not by an index: the gradient of one is a copy into zeros.
            reads = self.rule.output(reads[None], rule_tokens, parameters).squeeze(0)
        if kernels and self.kernel_combines:
            assert self.gate_proj is not None
            gate = self.gate_proj(tokens) if gate is None else gate
            output = self._combine_by_kernel(
                gate, reads, plan, assignment.weights, None if covered else sequences.valid
            )
        else:
            output = self._combine(tokens, upcast(scatter_slots(reads, plan, fan_out)), assignment.weights)
        if padding_mask is not None:
            output = torch.where(sequences.valid[:, None], output, 0)
        if state is not None:
            assert final_state is not None
            memory = final_state.unflatten(0, (self.num_states, num_sequences)).transpose(0, 1)
            state.update(memory, conv_state, sequences.lengths)
        output = output.to(x.dtype).unflatten(0, x.shape[:2])
        return output if loss is None else self._attach(output, loss)

    def _convolve_input(self, tokens: Tensor, sequences: Sequences, conv_state: Tensor | None) -> tuple[Tensor, Tensor]:
        """X + SiLU(conv(x)) along each sequence: binds a token to those before it in the text, whatever its memory."""
        assert self.conv_weight is not None
        plan = sort_slots(sequences.index, sequences.num_sequences)
        carried = None if conv_state is None else conv_state.flatten(0, 1)
        mixed, carried = short_conv(
            gather_tokens(tokens, plan, 1), self.conv_weight, self.conv_bias, plan.cu_seqlens, carried
        )
        return tokens + scatter_slots(F.silu(mixed), plan, 1).flatten(0, 1), carried[:, None]

    def _memory_of_slots(self, plan: SlotPlan, cu_memories: Tensor) -> Tensor:
        """`[R]`"""
        slots = torch.arange(plan.order.shape[0], device=cu_memories.device)
        return torch.searchsorted(cu_memories[1:].contiguous(), slots, right=True).clamp_max(self.num_states - 1)

    def _project(
        self, tokens: Tensor, plan: SlotPlan, cu_memories: Tensor, fan_out: int, covered: bool
    ) -> dict[str, Tensor]:
        """Every projection of every slot `[R, width]` by name."""
        first: dict[str, Tensor] = {}
        if self.memory_weight is not None:
            routed = gather_tokens(tokens, plan, fan_out)
            widths = [spec.first_width for spec in self.memory_projections.values()]
            parts = self._memory_linear(routed, self.memory_weight, cu_memories, covered).split(widths, -1)
            first |= dict(zip(self.memory_projections, parts, strict=True))
        if self.token_weight is not None:
            widths = [spec.first_width for spec in self.token_projections.values()]
            projected = gather_tokens(F.linear(tokens, self.token_weight), plan, fan_out)
            first |= dict(zip(self.token_projections, projected.split(widths, -1), strict=True))
        return {name: self._finish(name, first[name], cu_memories, covered) for name in self._names()}

    def _names(self) -> tuple[str, ...]:
        return *self.memory_projections, *self.token_projections

    def _finish(self, name: str, value: Tensor, cu_memories: Tensor, covered: bool) -> Tensor:
        """A projection's second matrix and its bias."""
        second, bias = self.second_stage.get(name), self.projection_bias.get(name)
        if second is not None:
            return self._memory_linear(value, second, cu_memories, covered, bias)
        if bias is None:
            return value
        if bias.shape[0] == 1:
            return value + bias.squeeze(0).to(value.dtype)
        # Of inputs without a channel a matrix makes nothing but the bias.
        none, no_input = value.new_empty(value.shape[0], 0), bias.new_empty(*bias.shape, 0)
        return value + self._memory_linear(none, no_input, cu_memories, covered, bias).to(value.dtype)

    def _memory_linear(
        self, x: Tensor, weight: Tensor, cu_memories: Tensor, covered: bool, bias: Tensor | None = None
    ) -> Tensor:
        """By the matrix of each slot's memory, or by one that is for all."""
        if weight.shape[0] == 1:
            # Not by an index: the gradient of one is a copy into zeros.
            return F.linear(x, weight.squeeze(0), None if bias is None else bias.squeeze(0))
        return grouped_linear(x, weight, cu_memories, bias=bias, covered=covered)

    def _convolves(self, name: str) -> bool:
        return name in self.convolved

    def _convolve(
        self, raw: dict[str, Tensor], plan: SlotPlan, conv_state: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The short convolution of the projections that ask for it, along each (memory, sequence) segment."""
        assert self.conv_weight is not None
        fused = torch.cat([raw[name] for name in self.convolved], -1)
        carried = None if conv_state is None else conv_state.transpose(0, 1).flatten(0, 1)
        mixed, carried = short_conv(fused, self.conv_weight, self.conv_bias, plan.cu_seqlens, carried)
        parts = mixed.split([raw[name].shape[-1] for name in self.convolved], -1)
        carried = carried.unflatten(0, (self.num_states, -1)).transpose(0, 1)
        return raw | dict(zip(self.convolved, parts, strict=True)), carried

    def _scan(
        self, tokens: Tokens, segments: Segments, state: MemoryState | None, num_sequences: int, covered: bool
    ) -> RuleOutput:
        """The rule's recurrence along tokens `[R, H, *]`."""
        return scan_segments(
            tokens,
            segments,
            form=self.rule.form,
            step=self.rule.step,
            scale=self.rule.scale,
            state_shape=self.rule.state_shape(),
            initial_state=self._initial_state(state, num_sequences),
            covered=covered,
            return_final_state=state is not None,
            impl=self.impl,
        )

    def _initial_state(self, state: MemoryState | None, num_sequences: int) -> Tensor | None:
        """`[N, H, K, V]`, segment n = m * B + b."""
        if state is not None:
            return state.memory.transpose(0, 1).flatten(0, 1)
        if self.initial_memory is not None:
            return self.initial_memory[:, None].expand(-1, num_sequences, -1, -1, -1).flatten(0, 1)
        return None

    def _combine(self, tokens: Tensor, reads: Tensor, weights: Tensor | None) -> Tensor:
        """Weighted sum of a token's reads `[S, F, H, V]`, gated norm, output projection: `[S, D]`."""
        mixed = reads.sum(1) if weights is None else (weights.to(reads.dtype)[..., None, None] * reads).sum(1)
        gate = None if self.gate_proj is None else self.gate_proj(tokens).unflatten(-1, mixed.shape[1:])
        dtype = tokens.dtype if gate is None else gate.dtype
        output: Tensor = self.out_proj(self.norm(mixed, gate, dtype).flatten(1))
        return output

    def _combine_by_kernel(
        self, gate: Tensor, reads: Tensor, plan: SlotPlan, weights: Tensor | None, valid: Tensor | None
    ) -> Tensor:
        from linear_moe.kernels.mixing import combine_reads

        mixed = combine_reads(reads, plan.place, weights, gate, self.norm.weight, eps=self.norm.eps, valid=valid)
        output: Tensor = self.out_proj(mixed)
        return output

    def new_state(
        self, batch_size: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> MemoryState:
        """The state of `batch_size` sequences before their first token.

        Args:
            batch_size: B, or the number of packed documents.
            dtype: of the convolution's inputs; the layer's unless given. The memory is float32 or float64.
            device: the layer's unless given.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        weight = self.out_proj.weight
        device, dtype = weight.device if device is None else device, dtype or weight.dtype
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        dims = self.rule.dims
        shape = (batch_size, self.num_states, dims.num_value_heads, *self.rule.state_shape())
        memory = torch.zeros(shape, dtype=wide, device=device)
        if self.initial_memory is not None:
            learned = self.initial_memory.to(memory)
            memory = memory + learned if torch.is_grad_enabled() else memory.copy_(learned.expand(shape))
        conv_shape = self._conv_shape(batch_size)
        conv = None if conv_shape is None else torch.zeros(conv_shape, dtype=dtype, device=device)
        seen = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return MemoryState(memory, conv, seen, self._owner)

    def _check(self, x: Tensor, sequences: Sequences, state: MemoryState | None) -> None:
        check_input(x, self.hidden_size, self.out_proj.weight.dtype)
        if state is None:
            return
        check_state(state, MemoryState, self._owner)
        dims = self.rule.dims
        shape = (sequences.num_sequences, self.num_states, dims.num_value_heads, *self.rule.state_shape())
        if tuple(state.memory.shape) != shape:
            raise ValueError(
                f"state.memory must be [B, memories, H, K, V] = {list(shape)} for this call, got {list(state.memory.shape)}"
            )
        expected_conv, given = (
            self._conv_shape(sequences.num_sequences),
            None if state.conv is None else state.conv.shape,
        )
        if (None if given is None else tuple(given)) != expected_conv:
            raise ValueError(
                f"state.conv must be {expected_conv and list(expected_conv)} for this call, got {given and list(given)}"
            )

    def _conv_shape(self, batch_size: int) -> tuple[int, ...] | None:
        """Of the convolution's carried inputs, None without a convolution."""
        if self.conv_weight is None:
            return None
        return (
            batch_size,
            1 if self.conv_scope == "sequence" else self.num_states,
            self.conv_width,
            len(self.conv_weight),
        )

    def _parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def extra_repr(self) -> str:
        dims = self.rule.dims
        return (
            f"rule={self.rule.name}, hidden_size={self.hidden_size}, heads={dims.num_heads}, "
            f"K={dims.head_dim}, V={dims.head_value_dim}, parameters={self._parameter_count():,}"
        )


def _is_a(value: object, expected: type) -> bool:
    if isinstance(value, bool):
        return expected is bool
    return isinstance(value, (int, float) if expected is float else expected)


def _build_rule(rule: str | type[UpdateRule], dims: RuleDims, options: Mapping[str, Any] | None) -> UpdateRule:
    cls = get_rule(rule) if isinstance(rule, str) else rule
    if not (isinstance(cls, type) and issubclass(cls, UpdateRule)):
        raise ValueError(f"rule must be the name of a registered rule or a subclass of UpdateRule, got {rule!r}")
    allowed: Iterable[str] = [field.name for field in fields(cls) if field.name != "dims"]
    types = get_type_hints(cls)
    for name, value in (options or {}).items():
        if name not in allowed:
            raise ValueError(f"rule {cls.name!r} has no option {name!r}; it has: {', '.join(allowed) or 'none'}")
        expected = types[name]
        # Plain types only: what else a rule's options may be is for the rule to check. A whole number is a float, too.
        if expected in (bool, int, float, str) and not _is_a(value, expected):
            raise ValueError(f"option {name!r} of rule {cls.name!r} must be a {expected.__name__}, got {value!r}")
    return cls(dims, **(options or {}))
