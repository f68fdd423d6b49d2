"""Gated DeltaNet (Yang et al., 2412.06464)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from linear_moe.forms import Decay, Erase, GateForms, Recurrence, SoftplusDecay
from linear_moe.rules.base import Parameter, Projection, RuleOutput, Tokens, UpdateRule, option
from linear_moe.rules.deltanet import write_strength
from linear_moe.rules.initializers import inverse_softplus_time_step, log_uniform_matrix
from linear_moe.rules.linear_attention import with_short_conv
from linear_moe.rules.registry import register_rule
from linear_moe.rules.scan import run_op
from linear_moe.rules.transforms import l2_norm


@register_rule("gated_deltanet")
@dataclass(frozen=True)
class GatedDeltaNet(UpdateRule):
    """S' = a_t S_{t-1}; S_t = S' + beta_t k_t (v_t - S'^T k_t)^T (eq. 10), log a_t = -exp(A_log) softplus(x_a + dt_bias)."""

    form = Recurrence(decay=Decay.SCALAR, erase=Erase.DELTA)
    normalizes_qk = True

    allow_negative_eigenvalues: bool = option(False, "beta up to 2 instead of 1")
    short_conv: bool = option(True, "a short convolution on q, k and v")

    def projections(self) -> dict[str, Projection]:
        gate = Projection(self.dims.num_value_heads)
        return with_short_conv(super().projections() | {"beta": gate, "decay": gate}, self.short_conv)

    def parameters(self) -> dict[str, Parameter]:
        shape = (self.dims.num_value_heads,)
        return {
            "A_log": Parameter(shape, log_uniform_matrix(0, 16)),
            "dt_bias": Parameter(shape, inverse_softplus_time_step),
        }

    def qk_transform(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return l2_norm(q), l2_norm(k)

    def gate_forms(self) -> GateForms:
        decay = SoftplusDecay("decay", rate="A_log", shift="dt_bias")
        return GateForms(decay, write_strength(self.allow_negative_eigenvalues))

    @staticmethod
    def step(state: Tensor, token: Tokens) -> tuple[Tensor, Tensor]:
        assert token.log_decay is not None and token.beta is not None
        state = token.log_decay.exp()[..., None] * state
        known = (token.k[..., None, :] @ state).squeeze(-2)
        write = token.beta[..., None] * (token.v - known)
        state = state + token.k[..., :, None] * write[..., None, :]
        return state, (token.q[..., None, :] @ state).squeeze(-2)


def gated_deltanet(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
    impl: str = "auto",
) -> RuleOutput:
    """The gated delta rule: S' = exp(log_decay_t) S_{t-1}, S_t = S' + beta_t k_t (v_t - S'^T k_t)^T, o_t = scale q_t^T S_t.

    Args:
        q: `[B, T, H_k, K]`, normalised.
        k: `[B, T, H_k, K]`, normalised: with |k| = 1 and beta in [0, 2] the state can't grow by erasing.
        v: `[B, T, H, V]`, H a multiple of H_k.
        log_decay: `[B, T, H]` natural log of the decay, at most 0.
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
        GatedDeltaNet,
        Tokens(q, k, v, log_decay, beta),
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        return_final_state=return_final_state,
        impl=impl,
    )
