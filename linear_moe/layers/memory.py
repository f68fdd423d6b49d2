"""A layer of one memory: the plain sequence mixer of a rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from linear_moe.layers.recurrent_mixer import Assignment, RecurrentMixer
from linear_moe.layers.sequences import Sequences
from linear_moe.rules.base import UpdateRule


class MemoryLayer(RecurrentMixer):
    """A linear recurrence as a sequence mixer: `[B, T, D]` to `[B, T, D]`.

    Args:
        hidden_size: D.
        rule: name of a registered rule, or the rule's class.
        num_heads: key heads H.
        head_dim: K.
        head_value_dim: V, K unless given.
        num_value_heads: heads of v and of the state, a multiple of `num_heads`, which is what it is unless given.
        conv_width: taps of the short convolution.
        conv_scope: "memory": along the sequence of a memory's own projections, where the rule asks for it;
            "sequence": x + SiLU(conv(x)) on the layer's input, for any rule.
        norm_eps: of the gated output norm.
        output_gate: what the output gate goes through: "silu", "sigmoid", or "none" for no gate.
        norm_groups: how many parts the value channels of all heads are normed in, with a weight a channel; each head by itself,
            with one weight for all, unless given.
        gate_before_norm: norm what the gate has been multiplied with, as Mamba2 does.
        layer_index: which layer of the model this is, from 0; some rules depend on it.
        num_layers: layers of the model.
        rule_options: the rule's own options by name.
        impl: "auto", "triton", "chunked" or "recurrent".
        device: of the parameters.
        dtype: of the parameters; the rule's gate parameters stay float32 in a 16-bit layer.

    Raises:
        ValueError: naming the argument that does not fit.
    """

    def __init__(
        self,
        hidden_size: int,
        rule: str | type[UpdateRule] = "gated_deltanet",
        *,
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
        layer_index: int = 0,
        num_layers: int = 1,
        rule_options: Mapping[str, Any] | None = None,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            hidden_size,
            rule,
            num_states=1,
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
            memory_projections="memory",
            query_projection="shared",
            learned_initial_memory=False,
            device=device,
            dtype=dtype,
        )

    def _assign(self, tokens: Tensor, sequences: Sequences, kernel: bool) -> tuple[Assignment, Tensor | None]:
        return Assignment(torch.zeros_like(sequences.index)[:, None], None, tokens), None

    def _attach(self, output: Tensor, loss: Tensor) -> Tensor:
        raise AssertionError("one memory has no auxiliary loss")
