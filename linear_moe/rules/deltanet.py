"""DeltaNet (Schlag et al., 2102.11174; Yang et al., 2406.06484)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from linear_moe.forms import Erase, GateForms, Recurrence, SigmoidStrength
from linear_moe.rules.base import Projection, RuleOutput, Tokens, UpdateRule, option
from linear_moe.rules.linear_attention import with_short_conv
from linear_moe.rules.registry import register_rule
from linear_moe.rules.scan import run_op
from linear_moe.rules.transforms import l2_norm


def write_strength(allow_negative_eigenvalues: bool) -> SigmoidStrength:
    """Beta in (0, 1), or in (0, 2), where a write may turn the state's sign along its key (2411.12537)."""
    return SigmoidStrength("beta", largest=2.0 if allow_negative_eigenvalues else 1.0)


@register_rule("deltanet")
@dataclass(frozen=True)
class DeltaNet(UpdateRule):
    """S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T, q and k of norm 1 (2406.06484, eq. 4 and section 3.3)."""

    form = Recurrence(erase=Erase.DELTA)
    normalizes_qk = True

    allow_negative_eigenvalues: bool = option(False, "beta up to 2 instead of 1")
    short_conv: bool = option(True, "a short convolution on q, k and v")

    def projections(self) -> dict[str, Projection]:
        beta = Projection(self.dims.num_value_heads)
        return with_short_conv(super().projections() | {"beta": beta}, self.short_conv)

    def qk_transform(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return l2_norm(q), l2_norm(k)

    def gate_forms(self) -> GateForms:
        return GateForms(beta=write_strength(self.allow_negative_eigenvalues))

    @staticmethod
    def step(state: Tensor, token: Tokens) -> tuple[Tensor, Tensor]:
        assert token.beta is not None
        known = (token.k[..., None, :] @ state).squeeze(-2)
        write = token.beta[..., None] * (token.v - known)
        state = state + token.k[..., :, None] * write[..., None, :]
        return state, (token.q[..., None, :] @ state).squeeze(-2)


def deltanet(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
    impl: str = "auto",
) -> RuleOutput:
    """The delta rule: S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T, o_t = scale q_t^T S_t.

    Args:
        q: `[B, T, H_k, K]`, normalised.
        k: `[B, T, H_k, K]`, normalised: with |k| = 1 and beta in [0, 2] the state can't grow by erasing.
        v: `[B, T, H, V]`, H a multiple of H_k.
        beta: `[B, T, H]` strength of each write, usually in [0, 1] or [0, 2].
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
        DeltaNet,
        Tokens(q, k, v, beta=beta),
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        return_final_state=return_final_state,
        impl=impl,
    )
