"""Mixture of Memories (Du et al., 2502.13685): any rule as the update of each of several memories."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from linear_moe.layers.recurrent_mixer import Assignment, RecurrentMixer
from linear_moe.layers.routing import Router, Routing
from linear_moe.layers.sequences import Sequences
from linear_moe.rules.base import UpdateRule
from linear_moe.rules.validate import check_count


class MoMLayer(RecurrentMixer):
    """A mixture of memories as a sequence mixer: `[B, T, D]` to `[B, T, D]`.

    A router picks `top_k` of M memories for each token (eq. 6 - 7); only those are updated, by the token's key, value and
    gates projected for that memory (eq. 8 - 9); the others stay bit for bit as they were. The read is the weighted sum of the
    picked memories' reads plus that of a shared memory, which every token updates (eq. 10 - 12).

    Args:
        hidden_size: D.
        rule: name of a registered rule, or the rule's class.
        num_memories: M, the shared memory not counted.
        top_k: memories picked a token.
        shared_memory: whether there is one more memory that every token updates and reads with weight 1.
        num_heads: key heads H.
        head_dim: K.
        head_value_dim: V, K unless given.
        num_value_heads: heads of v and of the state, a multiple of `num_heads`, which is what it is unless given.
        conv_width: taps of the short convolution.
        conv_scope: "memory": along each memory's own subsequence, where the rule asks for it, as in the paper's code;
            "sequence": x + SiLU(conv(x)) on the layer's input, for any rule, which binds a token to the one before it in the
            text even when they go to different memories.
        norm_eps: of the gated output norm.
        output_gate: what the output gate goes through: "silu", "sigmoid", or "none" for no gate.
        norm_groups: how many parts the value channels of all heads are normed in, with a weight a channel; each head by itself,
            with one weight for all, unless given.
        gate_before_norm: norm what the gate has been multiplied with, as Mamba2 does.
        memory_projections: "memory": keys, values and gates have one projection a memory; "shared": one for all.
        query_projection: "shared" or "memory", the same for queries.
        router_score: "softmax" or "sigmoid".
        renormalize: whether the picked weights are made to sum to 1. With `top_k=1` of several memories they never are.
        balance_weight: coefficient of the load-balance loss, per layer: 1 at balance.
        z_loss_weight: coefficient of the router's z-loss.
        balance_bias_rate: step of the selection bias that balances without a loss; 0 for none. Call
            `layer.update_balance_bias()` after each optimiser step.
        learned_initial_memory: start from learned states instead of zeros.
        auxiliary: "attach" the auxiliary losses to the output's gradient, or "collect" them for the user to add: see
            `linear_moe.layers.auxiliary`.
        layer_index: which layer of the model this is, from 0; some rules depend on it.
        num_layers: layers of the model.
        rule_options: the rule's own options by name.
        impl: "auto", "triton", "chunked" or "recurrent".
        device: of the parameters.
        dtype: of the parameters; the rule's gate parameters stay float32 in a 16-bit layer.

    Attributes:
        routing: `Routing` of the last forward: picks, weights, loads, entropy and loss values. None before the first.

    Raises:
        ValueError: naming the argument that does not fit.
    """

    def __init__(
        self,
        hidden_size: int,
        rule: str | type[UpdateRule] = "gated_deltanet",
        *,
        num_memories: int = 4,
        top_k: int = 2,
        shared_memory: bool = True,
        num_heads: int = 4,
        head_dim: int = 256,
        head_value_dim: int | None = None,
        num_value_heads: int | None = None,
        conv_width: int = 4,
        conv_scope: str = "memory",
        norm_eps: float = 1e-5,
        output_gate: str = "silu",
        norm_groups: int | None = None,
        gate_before_norm: bool = False,
        memory_projections: str = "memory",
        query_projection: str = "shared",
        router_score: str = "softmax",
        renormalize: bool = True,
        balance_weight: float = 0.01,
        z_loss_weight: float = 0.0,
        balance_bias_rate: float = 0.0,
        learned_initial_memory: bool = False,
        auxiliary: str = "attach",
        layer_index: int = 0,
        num_layers: int = 1,
        rule_options: Mapping[str, Any] | None = None,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_count("num_memories", num_memories)
        super().__init__(
            hidden_size,
            rule,
            num_states=num_memories + shared_memory,
            num_heads=num_heads,
            head_dim=head_dim,
            head_value_dim=head_value_dim,
            num_value_heads=num_value_heads,
            conv_width=conv_width,
            conv_scope=conv_scope,
            norm_eps=norm_eps,
            output_gate=output_gate,
            norm_groups=norm_groups,
            gate_before_norm=gate_before_norm,
            layer_index=layer_index,
            num_layers=num_layers,
            rule_options=rule_options,
            impl=impl,
            memory_projections=memory_projections,
            query_projection=query_projection,
            learned_initial_memory=learned_initial_memory,
            device=device,
            dtype=dtype,
        )
        self.num_memories = num_memories
        self.top_k = top_k
        self.shared_memory = shared_memory
        self.router = Router(
            hidden_size,
            num_memories,
            top_k,
            score=router_score,
            renormalize=renormalize,
            balance_weight=balance_weight,
            z_loss_weight=z_loss_weight,
            balance_bias_rate=balance_bias_rate,
            auxiliary=auxiliary,
            device=device,
            dtype=dtype,
        )
        self.routing: Routing | None = None

    def reset_parameters(self) -> None:
        """Initialise as published (2502.13685's code): Xavier of gain 2^-2.5 for every memory's every matrix."""
        super().reset_parameters()
        self.router.reset_parameters()

    def _assign(self, tokens: Tensor, sequences: Sequences, kernel: bool) -> tuple[Assignment, Tensor | None]:
        routing, loss, tokens = self.router(tokens, sequences.valid, shared=self.shared_memory, kernel=kernel)
        # What is kept for a look holds on to no graph, and the shared memory is nobody's pick.
        indices, weights = routing.indices[:, : self.top_k], routing.weights.detach()[:, : self.top_k]
        self.routing = replace(routing, indices=indices, weights=weights)
        return Assignment(routing.indices, routing.weights, tokens, self.shared_memory), loss

    def _attach(self, output: Tensor, loss: Tensor) -> Tensor:
        attached: Tensor = self.router.auxiliary(output, loss)
        return attached

    def update_balance_bias(self) -> None:
        """Move the selection bias by the loads since the last call; nothing without `balance_bias_rate`."""
        if self.router.bias is not None:
            self.router.bias.update_balance_bias()

    def inactive_parameters(self) -> int:
        """Parameters of the memories that a token does not use: `num_memories - top_k` memories' own."""
        stacked = [*(self.second_stage[n] for n in self.second_stage)]
        stacked += [self.projection_bias[n] for n in self.projection_bias]
        stacked += [
            p for n, p in self.gate_parameters.named_parameters() if self.gate_parameters.declared[n].per_memory
        ]
        stacked += [p for p in (self.memory_weight, self.initial_memory) if p is not None]
        own: int = sum(p[0].numel() for p in stacked if p.shape[0] == self.num_states)
        return own * (self.num_memories - self.top_k)

    def extra_repr(self) -> str:
        shared = " + shared" if self.shared_memory else ""
        return f"{super().extra_repr()}, memories={self.num_memories}{shared}, top_k={self.top_k}"
