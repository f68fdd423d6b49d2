"""The definition of `MoMLayer` and `MemoryLayer`: the equations of 2502.13685 token by token, memory by memory.

    p_t = scores(W_r x_t)            I_t = top-k(p_t)            g_t = p_t[I_t] / sum p_t[I_t]             (eq. 6 - 7)
    S_t^m = rule(S_{t-1}^m; k_t^m, v_t^m, gates_t^m)  for m in I_t;   S_t^m = S_{t-1}^m  otherwise         (eq. 8 - 9)
    o_t = sum_{m in I_t} g_t^m q_t^T S_t^m + q_t^T S_t^shared;        y_t = W_o norm_gated(o_t, W_g x_t)   (eq. 10 - 12)

It shares the parameters with a layer, by name, and the rule's own `tokens`, `step` and `output`, which have oracles of their
own. Nothing else: no slots, no sort, no segments, no chunks, no grouped matmul. So slow, and differentiable.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.layers.memory import MemoryLayer
from linear_moe.layers.mom import MoMLayer
from linear_moe.layers.state import MemoryState
from linear_moe.rules.base import Tokens


class MoMReference(NamedTuple):
    """What `mom_reference` returns, everything with its gradient."""

    output: Tensor
    """`[B, T, D]`, 0 at pads."""
    memory: Tensor
    """`[B, M + shared, H, K, V]` the final states."""
    conv: Tensor | None
    """The last W inputs of each short convolution, shaped as in `MemoryState`."""
    tokens: Tensor
    """`[B]` int64 real tokens of each sequence in this call."""
    load: Tensor
    """`[M]` fraction of the slots of each memory."""
    entropy: Tensor
    balance_loss: Tensor
    z_loss: Tensor
    loss: Tensor
    """The two losses times the layer's weights for them."""


@dataclass
class _Memory:
    """One memory of one sequence."""

    state: Tensor
    history: list[Tensor]
    """The last W inputs of its short convolution, oldest first."""


@dataclass
class _Statistics:
    """What the router's losses are made of: one entry a real token."""

    picks: list[int] = field(default_factory=list)
    probabilities: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)


def mom_reference(
    layer: MoMLayer | MemoryLayer,
    x: Tensor,
    *,
    padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state: MemoryState | None = None,
    dtype: torch.dtype = torch.float64,
) -> MoMReference:
    """What `layer` has to give for `x`.

    Args:
        layer: whose parameters are read; gradients reach them.
        x: `[B, T, D]`.
        padding_mask: `[B, T]` bool, true on real tokens.
        cu_seqlens: `[N + 1]` borders of packed documents.
        state: to start from. It is not changed.
        dtype: to compute in. The router, the gates, the norm and the states stay in at least float32.
    """
    return _Reference(layer, dtype)(x, padding_mask, cu_seqlens, state)


class _Reference:
    def __init__(self, layer: MoMLayer | MemoryLayer, dtype: torch.dtype) -> None:
        self.layer, self.rule, self.dtype = layer, layer.rule, dtype
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.router = layer.router if isinstance(layer, MoMLayer) else None
        self.projections = self._projection_matrices()
        self.parameters = {name: p.to(self.wide) for name, p in layer.gate_parameters.named_parameters()}
        self.statistics = _Statistics()

    def __call__(
        self, x: Tensor, padding_mask: Tensor | None, cu_seqlens: Tensor | None, state: MemoryState | None
    ) -> MoMReference:
        outputs: dict[tuple[int, int], Tensor] = {}
        finals: list[list[_Memory]] = []
        inputs: list[list[Tensor]] = []
        sequences = _places(x, padding_mask, cu_seqlens)
        for sequence, places in enumerate(sequences):
            memories = [self._memory(state, sequence, m) for m in range(self.layer.num_states)]
            history = self._input_history(state, sequence)
            start = 0 if state is None else int(state.tokens_seen[sequence])
            for position, (row, column) in enumerate(places, start):
                outputs[row, column] = self._token(x[row, column].to(self.dtype), position, memories, history)
            finals.append(memories)
            inputs.append(history)
        rows = [
            torch.stack(
                [outputs.get((row, column), x.new_zeros(x.shape[2], dtype=self.dtype)) for column in range(x.shape[1])]
            )
            for row in range(x.shape[0])
            if x.shape[1]
        ]
        memory = torch.stack([torch.stack([one.state for one in memories]) for memories in finals])
        output = torch.stack(rows) if rows else x.to(self.dtype)
        tokens = torch.tensor([len(places) for places in sequences], device=x.device)
        return MoMReference(output, memory, self._conv_state(finals, inputs), tokens, *self._losses(x))

    def _token(self, x: Tensor, position: int, memories: list[_Memory], history: list[Tensor]) -> Tensor:
        layer = self.layer
        if layer.conv_scope == "sequence":
            assert layer.conv_weight is not None
            x = x + F.silu(self._convolve(x, history))
        mixed = torch.zeros((), dtype=self.wide, device=x.device)
        for memory, weight in self._route(x):
            mixed = mixed + weight * self._update_and_read(x, memory, memories[memory], position)
        return layer.out_proj.weight.to(self.dtype) @ self._norm_and_gate(x, mixed).to(self.dtype)

    def _norm_and_gate(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The read `[H, V]` of the token x `[D]`, normed and gated: `[H * V]`."""
        norm, projection = self.layer.norm, self.layer.gate_proj
        read, gate = mixed.flatten(), torch.ones((), dtype=self.wide, device=x.device)
        if projection is not None:
            raw = (projection.weight.to(self.dtype) @ x).to(self.wide)
            gate = F.silu(raw) if norm.gate == "silu" else torch.sigmoid(raw)
        if norm.gate_first:
            read = read * gate
        size = mixed.shape[-1] if norm.groups is None else read.numel() // norm.groups
        parts = [part * torch.rsqrt(part.square().mean() + norm.eps) for part in read.split(size)]
        weight = norm.weight.repeat(len(parts)) if norm.groups is None else norm.weight
        normed = torch.cat(parts) * weight
        return normed if norm.gate_first else normed * gate

    def _route(self, x: Tensor) -> list[tuple[int, Tensor]]:
        """The memories of a token, each with its weight."""
        one = torch.ones((), dtype=self.wide, device=x.device)
        if self.router is None:
            return [(0, one)]
        assert isinstance(self.layer, MoMLayer)
        router, num_memories = self.router, self.layer.num_memories
        # Row by row: a matrix product may sum two equal rows in two orders, and there would be no ties.
        logits = torch.stack([(row.to(self.wide) * x.to(self.wide)).sum() for row in router.weight])
        scores = logits.softmax(0) if router.score == "softmax" else logits.sigmoid()
        ranking = scores.detach() if router.bias is None else scores.detach() + router.bias.bias
        picks = sorted(range(num_memories), key=lambda m: (-float(ranking[m]), m))[: router.top_k]
        total = sum((scores[m] for m in picks), torch.zeros_like(one))
        constant = router.top_k == 1 < num_memories
        weights = [scores[m] / total if router.renormalize and not constant else scores[m] for m in picks]
        self.statistics.picks += picks
        self.statistics.probabilities.append(scores / scores.sum())
        self.statistics.logits.append(logits)
        shared = [(num_memories, one)] if self.layer.shared_memory else []
        return [*zip(picks, weights, strict=True), *shared]

    def _update_and_read(self, x: Tensor, index: int, memory: _Memory, position: int) -> Tensor:
        """Project the token for memory `index`, update the memory with it, read it: `[H, V]`."""
        layer, rule = self.layer, self.rule
        raw = {name: self._project(x, name, index) for name in rule.projections()}
        if layer.convolved:
            channels = torch.cat([raw[name] for name in layer.convolved])
            mixed = self._convolve(channels, memory.history)
            raw |= dict(zip(layer.convolved, mixed.split([len(raw[name]) for name in layer.convolved]), strict=True))
        for name, spec in rule.projections().items():
            raw[name] = F.silu(raw[name]) if spec.activation == "silu" else raw[name]
        declared = rule.parameters()
        parameters = {
            name: value[torch.tensor([[index]])] if declared[name].per_memory else value
            for name, value in self.parameters.items()
        }
        at = torch.tensor([[position]], device=x.device)
        tokens = rule.tokens({name: value[None, None] for name, value in raw.items()}, parameters, at)
        state, read = rule.step(memory.state[None], self._one_token(tokens))
        memory.state = state[0]
        result = rule.output(read[:, None].to(tokens.v.dtype), tokens, parameters)
        return result[0, 0].to(self.wide)

    def _project(self, x: Tensor, name: str, memory: int) -> Tensor:
        """`[width]`: the projection `name` of a token, for a memory if it has one of its own."""
        for matrix in self.projections[name]:
            x = matrix[memory if matrix.shape[0] > 1 else 0] @ x
        if name in self.layer.projection_bias:
            bias = self.layer.projection_bias[name]
            x = x + bias[memory if bias.shape[0] > 1 else 0].to(self.dtype)
        return x

    def _projection_matrices(self) -> dict[str, list[Tensor]]:
        """The matrices `[1 or M + shared, out, in]` that a token goes through, one or two a name."""
        layer, matrices = self.layer, {}
        for names, fused in (
            (layer.memory_projections, layer.memory_weight),
            (layer.token_projections, layer.token_weight),
        ):
            start = 0
            for name, spec in names.items():
                width = spec.width if spec.rank is None else spec.rank
                assert fused is not None
                rows = fused[..., start : start + width, :]
                matrices[name] = [rows.reshape(-1, *rows.shape[-2:]).to(self.dtype)]
                start += width
                if spec.rank is not None:
                    matrices[name].append(layer.second_stage[name].to(self.dtype))
        return matrices

    def _convolve(self, x: Tensor, history: list[Tensor]) -> Tensor:
        """The newest output of a causal depthwise convolution, whose inputs `history` then holds `x` too."""
        weight, bias = self.layer.conv_weight, self.layer.conv_bias
        assert weight is not None
        history.append(x)
        del history[0]
        total = sum(
            (weight[:, w].to(self.wide) * past.to(self.wide) for w, past in enumerate(history)), torch.zeros_like(x)
        )
        return (total if bias is None else total + bias.to(self.wide)).to(self.dtype)

    def _one_token(self, tokens: Tokens) -> Tokens:
        """`[1, 1, H, *]` to what `UpdateRule.step` takes: `[1, H, *]`, q scaled, key heads repeated to the value heads."""
        heads = tokens.v.shape[2]
        q, k, v = (x[:, 0].to(self.wide) for x in (tokens.q, tokens.k, tokens.v))
        repeats = heads // q.shape[1]
        decay = tokens.log_decay
        if decay is not None:
            decay = decay.to(self.wide)
            # [H], [1, 1, H] or [1, 1, H, K]
            decay = decay.view(1, heads, -1)
        return Tokens(
            q=q.repeat_interleave(repeats, 1) * self.rule.scale,
            k=k.repeat_interleave(repeats, 1),
            v=v,
            log_decay=decay,
            beta=None if tokens.beta is None else tokens.beta[:, 0].to(self.wide),
            extras={name: extra[:, 0].to(self.wide) for name, extra in tokens.extras.items()},
        )

    def _memory(self, state: MemoryState | None, sequence: int, index: int) -> _Memory:
        layer, rule = self.layer, self.rule
        shape = (rule.dims.num_value_heads, *rule.state_shape())
        device = layer.out_proj.weight.device
        if state is not None:
            first = state.memory[sequence, index].to(self.wide)
        elif layer.initial_memory is not None:
            first = layer.initial_memory[index].to(self.wide)
        else:
            first = torch.zeros(shape, dtype=self.wide, device=device)
        if not layer.convolved:
            return _Memory(first, [])
        return _Memory(first, self._history(state, sequence, index))

    def _input_history(self, state: MemoryState | None, sequence: int) -> list[Tensor]:
        return self._history(state, sequence, 0) if self.layer.conv_scope == "sequence" else []

    def _history(self, state: MemoryState | None, sequence: int, index: int) -> list[Tensor]:
        """The W inputs before the first token."""
        weight = self.layer.conv_weight
        assert weight is not None
        if state is not None and state.conv is not None:
            return [past.to(self.dtype) for past in state.conv[sequence, index]]
        return [torch.zeros(weight.shape[0], dtype=self.dtype, device=weight.device) for _ in range(weight.shape[1])]

    def _conv_state(self, finals: list[list[_Memory]], inputs: list[list[Tensor]]) -> Tensor | None:
        if self.layer.conv_scope == "sequence":
            return torch.stack([torch.stack(history)[None] for history in inputs])
        if self.layer.convolved:
            return torch.stack([torch.stack([torch.stack(one.history) for one in memories]) for memories in finals])
        return None

    def _losses(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Load, entropy, balance loss M sum_m f_m P_m, z-loss, and the weighted sum of the two losses."""
        zero = torch.zeros((), dtype=self.wide, device=x.device)
        num_memories = self.router.num_choices if self.router is not None else 0
        if self.router is None or not self.statistics.logits:
            return zero.expand(num_memories), zero, zero, zero, zero
        counts = torch.bincount(torch.tensor(self.statistics.picks), minlength=num_memories).to(zero)
        load = counts / counts.sum()
        probabilities = torch.stack(self.statistics.probabilities)
        entropy = torch.special.entr(probabilities).sum(-1).mean()
        balance = num_memories * (load * probabilities.mean(0)).sum()
        z = torch.stack(self.statistics.logits).logsumexp(-1).square().mean()
        return load, entropy, balance, z, self.router.balance_weight * balance + self.router.z_loss_weight * z


def _places(x: Tensor, padding_mask: Tensor | None, cu_seqlens: Tensor | None) -> list[list[tuple[int, int]]]:
    """Where the real tokens of each sequence stand in `x`, in order."""
    if cu_seqlens is not None:
        borders = cu_seqlens.tolist()
        return [[(0, t) for t in range(start, end)] for start, end in pairwise(borders)]
    return [
        [(b, t) for t in range(x.shape[1]) if padding_mask is None or bool(padding_mask[b, t])]
        for b in range(x.shape[0])
    ]
