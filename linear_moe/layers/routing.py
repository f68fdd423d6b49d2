"""The router of a mixture: scores, picks, weights, statistics; and the plan that sorts the routed slots."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linear_moe.layers.auxiliary import AuxiliaryLoss
from linear_moe.layers.balance import BalanceBias, balance_loss, load_fractions, z_loss
from linear_moe.rules.base import upcast
from linear_moe.rules.validate import check_coefficient, check_count
from linear_moe.static_tensors import static

ROUTER_SCORES = ("softmax", "sigmoid")
LARGEST_KERNEL_CHOICES = 256
"""More are routed in PyTorch."""


@dataclass(frozen=True)
class Routing:
    """What the router decided for S tokens, and how even it was. Statistics are detached scalars, pads left out."""

    indices: Tensor
    """`[S, k]` int64: the picked choices, best first. With a shared choice `[S, k + 1]`, the last M."""
    weights: Tensor
    """Their weights, float32 (float64 for float64 input). A shared choice has 1."""
    valid: Tensor
    """`[S]` bool: real tokens. A pad's picks mean nothing."""
    load: Tensor
    """`[M]` fraction of the slots that each choice got."""
    entropy: Tensor
    """Mean entropy of a token's scores, in nats: log M when undecided, 0 when certain."""
    balance_loss: Tensor
    """1 at balance; not yet multiplied by its weight."""
    z_loss: Tensor


class Router(nn.Module):
    """Top-k routing of tokens over M choices: p = scores(W x), I = top-k(p), g = p[I] / sum p[I] (2502.13685, eq. 6 - 7).

    Args:
        hidden_size: D.
        num_choices: M.
        top_k: choices a token, at most M.
        score: "softmax", or "sigmoid" (scores that do not compete).
        renormalize: whether the picked weights are made to sum to 1. With one picked of several the weight stays p
            itself: renormalised it would be a constant 1, and the router would learn nothing.
        balance_weight: coefficient of the balance loss.
        z_loss_weight: coefficient of the z-loss.
        balance_bias_rate: step of the selection bias that balances without a loss; 0 for none.
        auxiliary: "attach" or "collect" the losses; see `linear_moe.layers.auxiliary`.

    Logits and scores are float32 (float64 for float64 input), summed over D in an order that does not depend on the
    number of tokens, so that a token is routed alike in training, prefill and decoding. Ties go to the lowest index.

    Raises:
        ValueError: naming the argument that does not fit.
    """

    def __init__(
        self,
        hidden_size: int,
        num_choices: int,
        top_k: int,
        *,
        score: str = "softmax",
        renormalize: bool = True,
        balance_weight: float = 0.01,
        z_loss_weight: float = 0.0,
        balance_bias_rate: float = 0.0,
        auxiliary: str = "attach",
        choice: str = "num_memories",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count(choice, num_choices)
        if not isinstance(top_k, int) or not 1 <= top_k <= num_choices:
            raise ValueError(f"top_k must be an integer in [1, {choice} = {num_choices}], got {top_k}")
        if score not in ROUTER_SCORES:
            raise ValueError(f"router_score must be one of {', '.join(ROUTER_SCORES)}, got {score!r}")
        for name, value in (
            ("balance_weight", balance_weight),
            ("z_loss_weight", z_loss_weight),
            ("balance_bias_rate", balance_bias_rate),
        ):
            check_coefficient(name, value)
        self.num_choices = num_choices
        self.top_k = top_k
        self.score = score
        self.renormalize = renormalize
        self.balance_weight = balance_weight
        self.z_loss_weight = z_loss_weight
        self.weight = nn.Parameter(torch.empty(num_choices, hidden_size, device=device, dtype=dtype))
        self.auxiliary = AuxiliaryLoss(auxiliary)
        self.bias = BalanceBias(num_choices, balance_bias_rate) if balance_bias_rate else None
        if device is not None:
            self.auxiliary.to(device)
            if self.bias is not None:
                self.bias.to(device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier with the gain of the paper's code, 2^-2.5."""
        nn.init.xavier_uniform_(self.weight, gain=2**-2.5)
        self.auxiliary.reset_parameters()
        if self.bias is not None:
            self.bias.reset_parameters()

    def forward(
        self, x: Tensor, valid: Tensor, *, shared: bool = False, kernel: bool = False
    ) -> tuple[Routing, Tensor, Tensor]:
        """Route tokens `x` `[S, D]`, real where `valid` `[S]`, by kernels or in PyTorch.

        With `shared` one more choice, number M, stands behind every token's picks with weight 1. It is in no statistic.

        Returns:
            The routing, the weighted auxiliary loss (a scalar with a gradient) for `auxiliary`, and the tokens for their next
            use: the gradients of both uses are then added in one pass.
        """
        # With one picked of several the weight stays the score.
        renormalize = self.renormalize and (self.top_k > 1 or self.num_choices == 1)
        by_kernel = kernel and self.num_choices <= LARGEST_KERNEL_CHOICES
        routing, loss, tokens = (self._by_kernel if by_kernel else self._in_torch)(x, valid, renormalize, shared)
        if self.bias is not None and self.training:
            self.bias.observe(routing.load)
        return routing, loss, tokens

    def _by_kernel(self, x: Tensor, valid: Tensor, renormalize: bool, shared: bool) -> tuple[Routing, Tensor, Tensor]:
        from linear_moe.kernels.router_operator import route

        made = route(
            x,
            self.weight,
            valid,
            top_k=self.top_k,
            score=self.score,
            renormalize=renormalize,
            bias=None if self.bias is None else self.bias.bias,
            shared=shared,
            balance_weight=self.balance_weight,
            z_loss_weight=self.z_loss_weight,
        )
        routing = Routing(
            indices=made.indices,
            weights=made.weights,
            valid=valid,
            load=made.load,
            entropy=made.entropy,
            balance_loss=made.balance_loss,
            z_loss=made.z_loss,
        )
        return routing, made.loss, made.tokens

    def _in_torch(self, x: Tensor, valid: Tensor, renormalize: bool, shared: bool) -> tuple[Routing, Tensor, Tensor]:
        # Products and sums of their own: autocast would make a 16-bit matmul of it.
        logits = ordered_sum(upcast(x)[:, None, :] * self.weight.to(upcast(x).dtype))
        if self.score == "softmax":
            scores = probabilities = torch.softmax(logits, -1)
        else:
            scores = torch.sigmoid(logits)
            probabilities = _normalized(scores)
        selection = scores.detach() if self.bias is None else self.bias(scores.detach())
        indices = best_first(selection, self.top_k)
        weights = scores.gather(-1, indices)
        if renormalize:
            weights = _normalized(weights)

        load = load_fractions(indices, self.num_choices, valid, scores.dtype)
        balance = balance_loss(probabilities, load, valid)
        # What is only looked at has no gradient to be made.
        z = z_loss(logits if self.z_loss_weight else logits.detach(), valid)
        seen = probabilities.detach()
        entropies = -(seen * torch.log(seen.clamp_min(torch.finfo(scores.dtype).tiny))).sum(-1)
        entropy = torch.where(valid, entropies, 0).sum() / valid.sum().clamp_min(1)
        if shared:
            indices = F.pad(indices, (0, 1), value=self.num_choices)
            weights = F.pad(weights, (0, 1), value=1.0)
        routing = Routing(
            indices=indices,
            weights=weights,
            valid=valid,
            load=load.detach(),
            entropy=entropy,
            balance_loss=balance.detach(),
            z_loss=z.detach(),
        )
        loss = self.balance_weight * balance
        return routing, loss + self.z_loss_weight * z if self.z_loss_weight else loss, x

    def extra_repr(self) -> str:
        parts = f"num_choices={self.num_choices}, top_k={self.top_k}, score={self.score}"
        return parts + (f", z_loss_weight={self.z_loss_weight}" if self.z_loss_weight else "")


FEW_PICKS = 4
"""Up to so many picks, finding each in turn takes a GPU less time than sorting a token's scores."""


def best_first(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest of `scores` `[S, M]`, best first, ties to the lowest: `[S, count]`."""
    if count > FEW_PICKS:
        return torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :count]
    picks: list[Tensor] = []
    for _ in range(count):
        if picks:
            scores = scores.scatter(-1, picks[-1], -torch.inf)
        picks.append(scores.argmax(-1, keepdim=True))
    return torch.cat(picks, -1)


def _normalized(scores: Tensor) -> Tensor:
    """Scores over their sum, which sigmoids that have all underflowed make 0."""
    return scores / scores.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)


def ordered_sum(x: Tensor) -> Tensor:
    """Sum over the last dim by folding halves: the order of the additions depends on that dim's size alone.

    A library's reduction may split a row differently when there are more or fewer rows, and a bit's difference is
    enough to send a token to another memory in decoding than in training.
    """
    while (width := x.shape[-1]) > 1:
        half = width // 2
        folded = x[..., :half] + x[..., half : 2 * half]
        x = torch.cat((folded, x[..., -1:]), -1) if width % 2 else folded
    return x[..., 0]


@dataclass(frozen=True)
class SlotPlan:
    """A stable sort of slots by group: where each slot goes, and where each group begins. Static sizes, no host sync."""

    order: Tensor
    """`[R]` the slot at each sorted place."""
    place: Tensor
    """`[R]` the sorted place of each slot: the inverse of `order`."""
    cu_seqlens: Tensor
    """`[N + 1]` where each group begins; `cu_seqlens[N]` slots are in a group, the rest (pads) trail."""
    identity: bool = False
    """Whether it is known that slot i is token i and stays at place i."""
    source: Tensor | None = None
    """`[R]` int64 the token of the slot at each sorted place, where kernels sort."""
    segment: Tensor | None = None
    """`[R]` int32 the group of the slot at each sorted place, N of a pad's, where kernels sort or there is nothing to sort."""
    ends: Tensor | None = None
    """`[M]` int32 where each memory's places end, where kernels sort."""


@static
def slots_of_batch(num_sequences: int, length: int, device: torch.device) -> SlotPlan:
    """The plan of one memory and a batch without pads: there is nothing to sort."""
    places = torch.arange(num_sequences * length, device=device)
    borders = torch.arange(num_sequences + 1, device=device) * length
    return SlotPlan(places, places, borders, identity=True, segment=(places // max(length, 1)).to(torch.int32))


def sort_slots(groups: Tensor, num_groups: int) -> SlotPlan:
    """Sort slots by `groups` `[R]` int64, keeping their order inside a group; `num_groups` marks a pad."""
    sorted_groups, order = torch.sort(groups, stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    borders = torch.arange(num_groups + 1, device=groups.device)
    return SlotPlan(order, place, torch.searchsorted(sorted_groups, borders))
