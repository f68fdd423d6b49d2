"""What a rule is: the declaration that everything else is derived from."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.forms import GateForms, Recurrence, SigmoidStrength, SoftplusDecay
from linear_moe.rules.validate import check_count

Initializer = Callable[[tuple[int, ...]], Tensor]


class RuleOutput(NamedTuple):
    """What every op returns."""

    output: Tensor
    """`[B, T, H, V]`, in the dtype of v."""
    final_state: Tensor | None
    """`[N, H, K, V]`, float32 (float64 for float64 input); None unless asked for."""


class Tokens(NamedTuple):
    """What the recurrence sees of the tokens, ready to use: no conv, norm, rotary or feature map is left to do.

    Over a whole input the tensors are `[B, T, H, *]`; inside `UpdateRule.step` they are one token's, `[N, H, *]`.
    """

    q: Tensor
    """`[B, T, H, K]` the query, not yet scaled."""
    k: Tensor
    """`[B, T, H, K]` the key."""
    v: Tensor
    """`[B, T, H, V]` the value."""
    log_decay: Tensor | None = None
    """`[H]`, `[B, T, H]` or `[B, T, H, K]`: natural log of the decay, fp32, at most 0. See `Decay`."""
    beta: Tensor | None = None
    """`[B, T, H]` the strength of a delta write, fp32."""
    extras: Mapping[str, Tensor] = {}
    """`[B, T, ...]` whatever else a rule's `step` or `output` needs, by name."""


@dataclass(frozen=True)
class RuleDims:
    """The sizes a rule is built with."""

    hidden_size: int
    num_heads: int
    """Key heads of q and k."""
    num_value_heads: int
    """Heads of v and of the state: a multiple of `num_heads`."""
    head_dim: int
    """K"""
    head_value_dim: int
    """V"""
    layer_index: int = 0
    num_layers: int = 1

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_heads", "num_value_heads", "head_dim", "head_value_dim", "num_layers"):
            check_count(name, getattr(self, name))
        if self.num_value_heads % self.num_heads:
            raise ValueError(
                f"num_value_heads must be a multiple of num_heads = {self.num_heads}, got {self.num_value_heads}"
            )
        if not 0 <= self.layer_index < self.num_layers:
            raise ValueError(f"layer_index must be in [0, num_layers = {self.num_layers}), got {self.layer_index}")


@dataclass(frozen=True)
class Projection:
    """A linear map of the layer's input that a rule asks for. The layer owns its weight."""

    width: int
    """Channels a token."""
    per_memory: bool = True
    """One matrix a memory, or one for all of them. A `MoMLayer` may override it for its study."""
    conv: bool = False
    """A causal short convolution follows."""
    conv_bias: bool = False
    activation: str | None = None
    """None or "silu", after the convolution."""
    rank: int | None = None
    """Through a bottleneck of this width: two matrices instead of one."""
    bias: bool = False
    """A bias on the (last) matrix, initialised to 0."""

    @property
    def first_width(self) -> int:
        """Channels of the (first) matrix."""
        return self.width if self.rank is None else self.rank


@dataclass(frozen=True)
class Parameter:
    """A parameter that is no projection: a decay's base, a bias in time, a skip."""

    shape: tuple[int, ...]
    init: Initializer
    per_memory: bool = False
    weight_decay: bool = False
    fp32: bool = True
    """Stays float32 when the module is cast to a 16-bit dtype."""


def option(default: Any, help: str) -> Any:
    """A rule's option: a dataclass field with a default and a line of help that YAML and the docs show."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class UpdateRule(ABC):
    """A linear recurrence, declared. Subclasses are frozen dataclasses whose further fields are the rule's options.

    A subclass states `step` and, if its recurrence is a point of `Recurrence`, the `form`: from that come the chunked
    implementation and the kernels. A rule without a form runs everywhere by its `step`, slower. Options are checked in the
    subclass's `__post_init__`.
    """

    dims: RuleDims

    name: ClassVar[str] = ""
    """Set by `register_rule`."""
    form: ClassVar[Recurrence | None] = None
    rotary: ClassVar[bool] = False
    """Whether `tokens` needs the positions of the text."""
    normalizes_qk: ClassVar[bool] = False
    """Whether `qk_transform` is `transforms.l2_norm` of both and `tokens` the default: a kernel of the layer
    then makes the norm with the short convolution."""

    @property
    def scale(self) -> float:
        """The factor on every read: K^-0.5."""
        return math.sqrt(1 / self.dims.head_dim)

    def state_shape(self) -> tuple[int, int]:
        """Rows and columns of one head's state, (K, V) unless a rule keeps more in it."""
        return self.dims.head_dim, self.dims.head_value_dim

    def projections(self) -> dict[str, Projection]:
        """The projections of a token by name. `q`, `k` and `v` are what the default `tokens` reads."""
        dims = self.dims
        return {
            "q": Projection(dims.num_heads * dims.head_dim, per_memory=False),
            "k": Projection(dims.num_heads * dims.head_dim),
            "v": Projection(dims.num_value_heads * dims.head_value_dim),
        }

    def parameters(self) -> dict[str, Parameter]:
        """The rule's own parameters by name."""
        return {}

    def qk_transform(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Norm, rotary or feature map of q and k `[..., H, K]` at the text's `positions` `[...]`."""
        return q, k

    def gate_forms(self) -> GateForms:
        """The gates that have a declared form: the default `gates` makes them, and so may a kernel. None by default."""
        return GateForms()

    def gates(self, raw: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Raw projections `[..., width]` to `log_decay` and `beta`, in float32 (float64 for float64 input).

        Those of `gate_forms` by default. A name other than these two becomes one of the tokens' `extras`.
        """
        decay, strength = self.gate_forms()
        gates = {}
        if decay is not None:
            gates["log_decay"] = softplus_decay(decay, raw, parameters)
        if strength is not None:
            gates["beta"] = sigmoid_strength(strength, raw)
        return gates

    def tokens(self, raw: Mapping[str, Tensor], parameters: Mapping[str, Tensor], positions: Tensor) -> Tokens:
        """Raw projections `[..., width]` (after conv and activation) to what the recurrence sees."""
        q, k = self.qk_transform(self._heads(raw["q"]), self._heads(raw["k"]), positions)
        return self._gated(q, k, raw, parameters)

    def normalized_tokens(self, raw: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Tokens:
        """`tokens` of a rule that `normalizes_qk`, from q and k whose norm is made."""
        return self._gated(self._heads(raw["q"]), self._heads(raw["k"]), raw, parameters)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.dims.num_heads, self.dims.head_dim))

    def _gated(self, q: Tensor, k: Tensor, raw: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Tokens:
        v = raw["v"].unflatten(-1, (self.dims.num_value_heads, self.dims.head_value_dim))
        gates = self.gates(raw, parameters)
        log_decay, beta = gates.pop("log_decay", None), gates.pop("beta", None)
        return Tokens(q, k, v, log_decay, beta, gates)

    @abstractmethod
    def step(self, state: Tensor, token: Tokens) -> tuple[Tensor, Tensor]:
        """The paper's recurrence for one token: the oracle of every other implementation.

        May be a static method where it needs none of the rule's options.

        Args:
            state: `[N, H, K, V]`, float32 or float64.
            token: one token's tensors in the state's dtype: q (scaled) and k `[N, H, K]`, key heads repeated to the
                value heads, v `[N, H, V]`, log_decay `[N, H, 1]` or `[N, H, K]`, beta `[N, H]`, extras `[N, ...]`.

        Returns:
            The new state and the read `[N, H, V]`.
        """

    def output(self, output: Tensor, tokens: Tokens, parameters: Mapping[str, Tensor]) -> Tensor:
        """What follows the recurrence's read `[..., H, V]`: a skip, a normaliser. Nothing by default."""
        return output


def softplus_decay(form: SoftplusDecay, raw: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Tensor:
    """-exp(rate) softplus(x + shift)."""
    time = F.softplus(upcast(raw[form.projection]) + parameters[form.shift])
    return -upcast(parameters[form.rate]).exp() * time


def sigmoid_strength(form: SigmoidStrength, raw: Mapping[str, Tensor]) -> Tensor:
    """A sigmoid times the largest strength."""
    return torch.sigmoid(upcast(raw[form.projection])) * form.largest


def upcast(tensor: Tensor) -> Tensor:
    """`tensor` in at least float32: the dtype in which gates, norms and states are computed."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
