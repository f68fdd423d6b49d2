"""Mamba2, the state space dual (Dao and Gu, 2405.21060)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.forms import Decay, Recurrence
from linear_moe.rules.base import Parameter, Projection, RuleOutput, Tokens, UpdateRule, option, upcast
from linear_moe.rules.initializers import inverse_softplus_time_step, log_uniform_matrix
from linear_moe.rules.registry import register_rule
from linear_moe.rules.scan import run_op
from linear_moe.rules.validate import check_float, check_shape


@register_rule("mamba2")
@dataclass(frozen=True)
class Mamba2(UpdateRule):
    """S_t = exp(A dt_t) S_{t-1} + dt_t B_t x_t^T, y_t = C_t^T S_t + D x_t, A = -exp(A_log), dt = softplus(x_dt + dt_bias).

    In the words of the form: q = C, k = B, v = dt x, log_decay = dt A, and a scale of 1 (section 3 and section 7.1). B and
    C are shared by the heads of a group.
    """

    form = Recurrence(decay=Decay.SCALAR)

    num_groups: int = option(1, "groups of heads that share B and C")

    def __post_init__(self) -> None:
        if self.num_groups < 1 or self.dims.num_value_heads % self.num_groups:
            raise ValueError(
                f"num_groups must divide the {self.dims.num_value_heads} heads of mamba2, got {self.num_groups}"
            )

    @property
    def scale(self) -> float:
        return 1.0

    def projections(self) -> dict[str, Projection]:
        dims = self.dims
        shared = self.num_groups * dims.head_dim
        return {
            "C": Projection(shared, per_memory=False, conv=True, conv_bias=True, activation="silu"),
            "B": Projection(shared, conv=True, conv_bias=True, activation="silu"),
            "x": Projection(dims.num_value_heads * dims.head_value_dim, conv=True, conv_bias=True, activation="silu"),
            "dt": Projection(dims.num_value_heads),
        }

    def parameters(self) -> dict[str, Parameter]:
        shape = (self.dims.num_value_heads,)
        return {
            "A_log": Parameter(shape, log_uniform_matrix(1, 16)),
            "dt_bias": Parameter(shape, inverse_softplus_time_step),
            "D": Parameter(shape, torch.ones),
        }

    def tokens(self, raw: Mapping[str, Tensor], parameters: Mapping[str, Tensor], positions: Tensor) -> Tokens:
        dims = self.dims
        C, B = (raw[name].unflatten(-1, (self.num_groups, dims.head_dim)) for name in ("C", "B"))
        x = raw["x"].unflatten(-1, (dims.num_value_heads, dims.head_value_dim))
        dt = F.softplus(upcast(raw["dt"]) + parameters["dt_bias"])
        tokens = as_tokens(C, B, x, dt, -upcast(parameters["A_log"]).exp())
        return tokens._replace(extras={"x": x})

    @staticmethod
    def step(state: Tensor, token: Tokens) -> tuple[Tensor, Tensor]:
        assert token.log_decay is not None
        state = token.log_decay.exp()[..., None] * state + token.k[..., :, None] * token.v[..., None, :]
        return state, (token.q[..., None, :] @ state).squeeze(-2)

    def output(self, output: Tensor, tokens: Tokens, parameters: Mapping[str, Tensor]) -> Tensor:
        return _with_skip(output, parameters["D"], tokens.extras["x"])


def _with_skip(output: Tensor, D: Tensor, x: Tensor) -> Tensor:
    """The reads `[..., H, V]` and D x, added in float32, in the dtype of the reads."""
    return torch.addcmul(output, upcast(D)[:, None], x).to(output.dtype)


def as_tokens(C: Tensor, B: Tensor, x: Tensor, dt: Tensor, A: Tensor) -> Tokens:
    """The form's tokens. Products in float32, by promotion (a widened copy of x would be kept for the backward pass), rounded
    once to the dtype of x.
    """
    dt = upcast(dt)
    return Tokens(C, B, (dt[..., None] * x).to(x.dtype), dt * upcast(A))


def mamba2(
    C: Tensor,
    B: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
    impl: str = "auto",
) -> RuleOutput:
    """The Mamba2 recurrence: S_t = exp(A dt_t) S_{t-1} + dt_t B_t x_t^T, y_t = scale C_t^T S_t + D x_t.

    Args:
        C: `[B, T, G, K]` the read, shared by the heads of a group.
        B: `[B, T, G, K]` the write.
        x: `[B, T, H, V]`, H a multiple of G.
        dt: `[B, T, H]` time step, positive (softplus applied).
        A: `[H]` rate of decay, at most 0.
        D: `[H]` skip.
        scale: factor on the read, 1 if None.
        initial_state: `[N, H, K, V]` float32, zeros if None. N = the batch, or the documents of a packed input.
        cu_seqlens: `[N + 1]` int32 or int64, borders of the documents of a packed input with a batch of 1.
        return_final_state: return the state after the last token.
        impl: "auto", "triton", "chunked" or "recurrent".

    Returns:
        `RuleOutput(output [B, T, H, V] in x's dtype, final_state [N, H, K, V] float32 or None)`.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    if x.dim() != 4:
        raise ValueError(f"x must be [B, T, H, V], got shape {list(x.shape)}")
    batch, length, heads = x.shape[:3]
    for name, tensor in (("x", x), ("dt", dt), ("A", A), ("D", D)):
        check_float(name, tensor)
    check_shape("dt", dt, (batch, length, heads), "[B, T, H]")
    check_shape("A", A, (heads,), "[H]")
    check_shape("D", D, (heads,), "[H]")
    result = run_op(
        Mamba2,
        as_tokens(C, B, x, dt, A),
        scale=1.0 if scale is None else scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        return_final_state=return_final_state,
        impl=impl,
        names=("C", "B", "x"),
    )
    return result._replace(output=_with_skip(result.output, D, x))
