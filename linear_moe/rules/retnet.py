"""Retention (Sun et al., 2307.08621)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from linear_moe.forms import Decay, Recurrence
from linear_moe.rules.base import Projection, RuleOutput, Tokens, UpdateRule, option
from linear_moe.rules.linear_attention import with_short_conv
from linear_moe.rules.registry import register_rule
from linear_moe.rules.scan import run_op
from linear_moe.rules.transforms import rotary_of
from linear_moe.static_tensors import static


@static
def retention_log_decay(num_heads: int, device: torch.device) -> Tensor:
    """log(1 - 2^(-5 - h)) of head h (2307.08621, eq. 8): `[H]` float32."""
    # log1p, not log: 1 - 2^(-5 - h) rounds to 1 in float32 from h = 19 on.
    return torch.log1p(-torch.exp2(torch.arange(-5, -5 - num_heads, -1, device=device, dtype=torch.float32)))


@register_rule("retnet")
@dataclass(frozen=True)
class RetNet(UpdateRule):
    """S_t = g_h S_{t-1} + k_t v_t^T, g_h = 1 - 2^(-5-h), q and k with rotary positions (eq. 5 - 8)."""

    form = Recurrence(decay=Decay.HEAD)
    rotary = True

    rope_base: float = option(10000.0, "longest rotary wavelength over 2 pi")
    short_conv: bool = option(False, "a short convolution with SiLU on q, k and v")

    def __post_init__(self) -> None:
        if self.dims.head_dim % 2:
            raise ValueError(
                f"head_dim must be even for retnet (rotary turns pairs of channels), got {self.dims.head_dim}"
            )
        if self.rope_base <= 1:
            raise ValueError(f"rope_base must be above 1, got {self.rope_base}")

    def projections(self) -> dict[str, Projection]:
        return with_short_conv(super().projections(), self.short_conv)

    def qk_transform(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        rotate = rotary_of(q, positions, self.rope_base)
        return rotate(q), rotate(k)

    def gates(self, raw: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"log_decay": retention_log_decay(self.dims.num_value_heads, raw["q"].device)}

    @staticmethod
    def step(state: Tensor, token: Tokens) -> tuple[Tensor, Tensor]:
        assert token.log_decay is not None
        state = token.log_decay.exp()[..., None] * state + token.k[..., :, None] * token.v[..., None, :]
        return state, (token.q[..., None, :] @ state).squeeze(-2)


def retnet(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
    impl: str = "auto",
) -> RuleOutput:
    """Retention: S_t = g_h S_{t-1} + k_t v_t^T, o_t = scale q_t^T S_t, with g_h = 1 - 2^(-5-h) of value head h.

    Args:
        q: `[B, T, H_k, K]`, rotary applied.
        k: `[B, T, H_k, K]`, rotary applied.
        v: `[B, T, H, V]`, H a multiple of H_k.
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
        RetNet,
        Tokens(q, k, v, retention_log_decay(v.shape[2] if v.dim() == 4 else 1, v.device)),
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        return_final_state=return_final_state,
        impl=impl,
    )
