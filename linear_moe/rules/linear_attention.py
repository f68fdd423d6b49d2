"""Linear attention (Katharopoulos et al., 2006.16236)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from linear_moe.forms import Recurrence
from linear_moe.rules.base import Projection, RuleOutput, Tokens, UpdateRule, option, upcast
from linear_moe.rules.registry import register_rule
from linear_moe.rules.scan import run_op
from linear_moe.rules.transforms import FEATURE_MAPS

NORMALIZER_EPS = 1e-6


@register_rule("linear_attention")
@dataclass(frozen=True)
class LinearAttention(UpdateRule):
    """S_t = S_{t-1} + f(k_t) v_t^T, o_t = f(q_t)^T S_t (eq. 18 - 20), optionally over f(q_t)^T sum_j f(k_j).

    Nothing is ever forgotten. The normaliser is one more value column of the state, fed with ones.
    """

    form = Recurrence()

    feature_map: str = option("identity", f"f, on queries and keys: {', '.join(FEATURE_MAPS)}")
    normalize: bool = option(False, "divide the read by f(q)^T sum of f(k); needs a positive feature map")
    short_conv: bool = option(False, "a short convolution with SiLU on q, k and v")

    def __post_init__(self) -> None:
        if self.feature_map not in FEATURE_MAPS:
            raise ValueError(f"feature_map must be one of {', '.join(FEATURE_MAPS)}, got {self.feature_map!r}")
        if self.normalize and self.feature_map == "identity":
            raise ValueError("normalize=True needs a positive feature map (relu, elu), got feature_map='identity'")

    def state_shape(self) -> tuple[int, int]:
        return self.dims.head_dim, self.dims.head_value_dim + self.normalize

    def projections(self) -> dict[str, Projection]:
        return with_short_conv(super().projections(), self.short_conv)

    def qk_transform(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        feature_map = FEATURE_MAPS[self.feature_map]
        return feature_map(q), feature_map(k)

    def tokens(self, raw: Mapping[str, Tensor], parameters: Mapping[str, Tensor], positions: Tensor) -> Tokens:
        tokens = super().tokens(raw, parameters, positions)
        return tokens._replace(v=_with_ones(tokens.v)) if self.normalize else tokens

    @staticmethod
    def step(state: Tensor, token: Tokens) -> tuple[Tensor, Tensor]:
        state = state + token.k[..., :, None] * token.v[..., None, :]
        return state, (token.q[..., None, :] @ state).squeeze(-2)

    def output(self, output: Tensor, tokens: Tokens, parameters: Mapping[str, Tensor]) -> Tensor:
        return _divide(output) if self.normalize else output


def with_short_conv(projections: dict[str, Projection], wanted: bool) -> dict[str, Projection]:
    """q, k and v followed by a short convolution and SiLU, if wanted."""
    if not wanted:
        return projections
    return {
        name: replace(projection, conv=True, activation="silu") if name in ("q", "k", "v") else projection
        for name, projection in projections.items()
    }


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    normalize: bool = False,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
    impl: str = "auto",
) -> RuleOutput:
    """Linear attention over transformed queries and keys: S_t = S_{t-1} + k_t v_t^T, o_t = scale q_t^T S_t.

    Args:
        q: `[B, T, H_k, K]`, feature map applied.
        k: `[B, T, H_k, K]`, feature map applied.
        v: `[B, T, H, V]`, H a multiple of H_k.
        normalize: divide each read by q_t^T sum_j k_j (2006.16236, eq. 20). The state then has V + 1 columns.
        scale: factor on the read, K^-0.5 if None. Cancels under `normalize`.
        initial_state: `[N, H, K, V]` float32, zeros if None. N = B, or the documents of a packed input.
        cu_seqlens: `[N + 1]` int32 or int64, borders of the documents of a packed input with B = 1.
        return_final_state: return the state after the last token.
        impl: "auto", "triton", "chunked" or "recurrent".

    Returns:
        `RuleOutput(output [B, T, H, V] in v's dtype, final_state [N, H, K, V] float32 or None)`.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    result = run_op(
        LinearAttention,
        Tokens(upcast(q), upcast(k), _with_ones(v)) if normalize else Tokens(q, k, v),
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        return_final_state=return_final_state,
        impl=impl,
    )
    return result._replace(output=_divide(result.output).to(v.dtype)) if normalize else result


def _with_ones(v: Tensor) -> Tensor:
    v = upcast(v)
    return torch.cat((v, torch.ones_like(v[..., :1])), -1)


def _divide(output: Tensor) -> Tensor:
    return output[..., :-1] / (output[..., -1:] + NORMALIZER_EPS)
