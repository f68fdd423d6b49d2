"""Gated linear attention (Yang et al., 2312.06635)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from linear_moe.forms import Decay, Recurrence
from linear_moe.rules.base import Projection, RuleOutput, Tokens, UpdateRule, option, upcast
from linear_moe.rules.linear_attention import with_short_conv
from linear_moe.rules.registry import register_rule
from linear_moe.rules.scan import run_op


@register_rule("gla")
@dataclass(frozen=True)
class GLA(UpdateRule):
    """S_t = Diag(a_t) S_{t-1} + k_t v_t^T, a_t = sigmoid(W2 W1 x_t + b)^(1/16) a key channel (eq. 3; section 4.4)."""

    form = Recurrence(decay=Decay.VECTOR)

    gate_rank: int = option(16, "width of the bottleneck that the decay is projected through")
    gate_divisor: float = option(16.0, "the log of the decay is divided by this: larger remembers longer")
    short_conv: bool = option(False, "a short convolution with SiLU on q, k and v")

    def __post_init__(self) -> None:
        if self.gate_rank < 1:
            raise ValueError(f"gate_rank must be at least 1, got {self.gate_rank}")
        if self.gate_divisor <= 0:
            raise ValueError(f"gate_divisor must be above 0, got {self.gate_divisor}")

    def projections(self) -> dict[str, Projection]:
        width = self.dims.num_value_heads * self.dims.head_dim
        gate = Projection(width, rank=self.gate_rank, bias=True)
        return with_short_conv(super().projections() | {"decay": gate}, self.short_conv)

    def gates(self, raw: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        log_decay = F.logsigmoid(upcast(raw["decay"])) / self.gate_divisor
        return {"log_decay": log_decay.unflatten(-1, (self.dims.num_value_heads, self.dims.head_dim))}

    @staticmethod
    def step(state: Tensor, token: Tokens) -> tuple[Tensor, Tensor]:
        assert token.log_decay is not None
        state = token.log_decay.exp()[..., None] * state + token.k[..., :, None] * token.v[..., None, :]
        return state, (token.q[..., None, :] @ state).squeeze(-2)


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
    impl: str = "auto",
) -> RuleOutput:
    """Gated linear attention: S_t = Diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T, o_t = scale q_t^T S_t.

    Args:
        q: `[B, T, H_k, K]`.
        k: `[B, T, H_k, K]`.
        v: `[B, T, H, V]`, H a multiple of H_k.
        log_decay: `[B, T, H, K]` natural log of the decay of each key channel, at most 0.
        scale: factor on the read, K^-0.5 if None.
        initial_state: `[N, H, K, V]` float32, zeros if None. N = B, or the documents of a packed input.
        cu_seqlens: `[N + 1]` int32 or int64, borders of the documents of a packed input with B = 1.
        return_final_state: return the state after the last token.
        impl: "auto", "triton", "chunked" or "recurrent".

    Returns:
        `RuleOutput(output [B, T, H, V] in v's dtype, final_state [N, H, K, V] float32 or None)`.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    return run_op(
        GLA,
        Tokens(q, k, v, log_decay),
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        return_final_state=return_final_state,
        impl=impl,
    )
