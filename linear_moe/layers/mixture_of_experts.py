"""A mixture of experts as feed-forward: every token goes through its top-k experts, none is dropped."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from linear_moe.layers.checks import check_input
from linear_moe.layers.feed_forward import SwiGLU, gated_unit, swiglu_width
from linear_moe.layers.initialization import normal_init_
from linear_moe.layers.kernel_steps import kernels_run, plan_of
from linear_moe.layers.projections import grouped_linear
from linear_moe.layers.routing import Router, Routing, SlotPlan, sort_slots
from linear_moe.layers.sequences import Sequences, describe_sequences
from linear_moe.layers.slots import gather_tokens, scatter_slots
from linear_moe.rules.base import upcast
from linear_moe.rules.validate import check_padding_mask


class MixtureOfExperts(nn.Module):
    """y = sum_{e in top-k} g_e SwiGLU_e(x) + shared(x): `[B, T, D]` to `[B, T, D]` (2101.03961; shared experts 2401.06066).

    Slots are sorted by expert and go through grouped matmuls, at sizes that don't depend on the routing.

    Args:
        hidden_size: D.
        num_experts: E, shared experts not counted.
        top_k: experts a token.
        num_shared_experts: experts that every token uses with weight 1; they are one SwiGLU of their joint width.
        ratio: of one expert, as in `SwiGLU`; 4 if neither is given.
        width: the inner width of one expert, in place of `ratio`.
        router_score: "softmax" or "sigmoid".
        renormalize: whether the picked weights are made to sum to 1. With `top_k=1` of several experts they never are.
        balance_weight: coefficient of the load-balance loss: 1 at balance.
        z_loss_weight: coefficient of the router's z-loss.
        balance_bias_rate: step of the selection bias that balances without a loss; 0 for none. Call
            `update_balance_bias()` after each optimiser step.
        auxiliary: "attach" the auxiliary losses to the output's gradient, or "collect" them for the user to add: see
            `linear_moe.layers.auxiliary`.
        impl: "auto" or "triton" for kernels between the products where they run, as for the memory layers; any other name for
            PyTorch.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        routing: `Routing` of the last forward: picks, weights, loads, entropy and loss values. None before the first.

    Raises:
        ValueError: naming the argument that does not fit.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_experts: int = 8,
        top_k: int = 2,
        num_shared_experts: int = 0,
        ratio: float | None = None,
        width: int | None = None,
        router_score: str = "softmax",
        renormalize: bool = True,
        balance_weight: float = 0.01,
        z_loss_weight: float = 0.0,
        balance_bias_rate: float = 0.0,
        auxiliary: str = "attach",
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_shared_experts < 0:
            raise ValueError(f"num_shared_experts must be at least 0, got {num_shared_experts}")
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.top_k = top_k
        self.num_shared_experts = num_shared_experts
        self.impl = impl
        self.width = swiglu_width(hidden_size, ratio, width)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.router = Router(
            hidden_size,
            num_experts,
            top_k,
            score=router_score,
            renormalize=renormalize,
            balance_weight=balance_weight,
            z_loss_weight=z_loss_weight,
            balance_bias_rate=balance_bias_rate,
            auxiliary=auxiliary,
            choice="num_experts",
            **factory,
        )
        # Gate and up of each expert in one matrix: one matmul.
        self.in_weight = nn.Parameter(torch.empty(num_experts, 2 * self.width, hidden_size, **factory))
        self.out_weight = nn.Parameter(torch.empty(num_experts, hidden_size, self.width, **factory))
        shared_width = num_shared_experts * self.width
        self.shared = SwiGLU(hidden_size, width=shared_width, impl=impl, **factory) if shared_width else None
        self.routing: Routing | None = None
        self._reset_own_parameters()

    def reset_parameters(self) -> None:
        """N(0, 0.02), the router too."""
        self._reset_own_parameters()
        if self.shared is not None:
            self.shared.reset_parameters()

    def _reset_own_parameters(self) -> None:
        for weight in (self.router.weight, self.in_weight, self.out_weight):
            normal_init_(weight)

    def forward(self, x: Tensor, *, padding_mask: Tensor | None = None) -> Tensor:
        """Each real token of `x` through its experts.

        Args:
            x: `[B, T, D]`.
            padding_mask: `[B, T]` bool, true on real tokens. Pads are neither routed nor counted, and read 0.

        Returns:
            `[B, T, D]` in the dtype of x.

        Raises:
            ValueError: if `x` does not fit the layer, or the mask `x`.
        """
        check_input(x, self.hidden_size, self.in_weight.dtype)
        if padding_mask is not None:
            check_padding_mask(padding_mask, x.shape[0], x.shape[1])
        if x.shape[0] * x.shape[1] == 0:
            return torch.zeros_like(x)
        tokens = x.flatten(0, 1)
        mask = None if padding_mask is None else padding_mask.flatten()[None]
        # Experts know no sequences: all tokens are one.
        sequences = describe_sequences(tokens[None], mask)
        valid = sequences.valid
        if padding_mask is not None:
            tokens = torch.where(valid[:, None], tokens, 0)
        kernels = kernels_run(x, self.impl)
        routing, loss, tokens = self.router(tokens, valid, kernel=kernels)
        # What is kept for a look holds on to no graph.
        self.routing = replace(routing, weights=routing.weights.detach())

        plan = self._plan(routing.indices, sequences, kernels)
        # Without pads every slot is an expert's.
        covered = padding_mask is None
        routed = gather_tokens(tokens, plan, self.top_k, kernel=kernels)
        inner = gated_unit(grouped_linear(routed, self.in_weight, plan.cu_seqlens, covered=covered), kernel=kernels)
        slots = grouped_linear(inner, self.out_weight, plan.cu_seqlens, covered=covered)
        shared = None if self.shared is None else self.shared(tokens)
        if kernels:
            from linear_moe.kernels.mixing import weighted_sum

            output = weighted_sum(slots, plan.place, routing.weights, addend=shared, dtype=x.dtype)
        else:
            reads = upcast(scatter_slots(slots, plan, self.top_k))
            output = (routing.weights[..., None] * reads).sum(1)
            output = output if shared is None else output + shared
        if padding_mask is not None:
            output = torch.where(valid[:, None], output, 0)
        attached: Tensor = self.router.auxiliary(output.to(x.dtype).view_as(x), loss)
        return attached

    def _plan(self, experts: Tensor, sequences: Sequences, kernels: bool) -> SlotPlan:
        """The slots of `experts` `[S, k]` sorted by expert, in the order of the tokens."""
        if kernels:
            return plan_of(experts, sequences, self.num_experts)
        groups = torch.where(sequences.valid[:, None], experts, self.num_experts)
        return sort_slots(groups.flatten(), self.num_experts)

    def update_balance_bias(self) -> None:
        """Move the selection bias by the loads since the last call; nothing without `balance_bias_rate`."""
        if self.router.bias is not None:
            self.router.bias.update_balance_bias()

    def inactive_parameters(self) -> int:
        """Parameters of the experts that a token does not use: `num_experts - top_k` of them."""
        return (self.num_experts - self.top_k) * (self.in_weight[0].numel() + self.out_weight[0].numel())

    def extra_repr(self) -> str:
        shared = f" + {self.num_shared_experts} shared" if self.num_shared_experts else ""
        return (
            f"hidden_size={self.hidden_size}, experts={self.num_experts}{shared}, top_k={self.top_k}, "
            f"width={self.width}, parameters={sum(parameter.numel() for parameter in self.parameters()):,}"
        )
