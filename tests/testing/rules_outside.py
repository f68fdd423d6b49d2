"""Rules that are in no registry: two that keep the laws, and some that break one each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.forms import Decay, Erase, Recurrence
from linear_moe.rules import Parameter, Projection, Tokens, UpdateRule, option, upcast
from linear_moe.rules.transforms import l2_norm


def read(q: Tensor, state: Tensor) -> Tensor:
    """q^T S."""
    return (q[..., None, :] @ state).squeeze(-2)


def outer(k: Tensor, v: Tensor) -> Tensor:
    """K v^T."""
    return k[..., :, None] * v[..., None, :]


@dataclass(frozen=True)
class ChannelDelta(UpdateRule):
    """Declared: S' = Diag(a_t) S, S = S' + beta k (v - S'^T k)^T, a decay a channel, with a rate a memory."""

    form = Recurrence(decay=Decay.VECTOR, erase=Erase.DELTA)

    strongest: float = option(2.0, "the fastest decay")

    def projections(self) -> dict[str, Projection]:
        width = self.dims.num_value_heads * self.dims.head_dim
        gates = {"beta": Projection(self.dims.num_value_heads), "decay": Projection(width, rank=2)}
        return super().projections() | gates

    def parameters(self) -> dict[str, Parameter]:
        return {"rate": Parameter((self.dims.num_value_heads, 1), torch.ones, per_memory=True)}

    def qk_transform(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return l2_norm(q), l2_norm(k)

    def gates(self, raw: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        strength = torch.sigmoid(upcast(raw["decay"])).unflatten(-1, (self.dims.num_value_heads, self.dims.head_dim))
        return {
            "log_decay": -self.strongest * parameters["rate"].abs() * strength,
            "beta": torch.sigmoid(upcast(raw["beta"])),
        }

    @staticmethod
    def step(state: Tensor, token: Tokens) -> tuple[Tensor, Tensor]:
        assert token.log_decay is not None and token.beta is not None
        state = token.log_decay.exp()[..., None] * state
        state = state + outer(token.k, token.beta[..., None] * (token.v - read(token.k, state)))
        return state, read(token.q, state)


@dataclass(frozen=True)
class Momentum(UpdateRule):
    """Only a step: M = eta M + k v^T, S = a S + M, both kept in one state of 2 K rows; eta is one of the extras."""

    def state_shape(self) -> tuple[int, int]:
        return 2 * self.dims.head_dim, self.dims.head_value_dim

    def projections(self) -> dict[str, Projection]:
        gate = Projection(self.dims.num_value_heads)
        return super().projections() | {"decay": gate, "momentum": gate}

    def gates(self, raw: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"log_decay": F.logsigmoid(upcast(raw["decay"])), "eta": torch.sigmoid(upcast(raw["momentum"]))}

    def step(self, state: Tensor, token: Tokens) -> tuple[Tensor, Tensor]:
        assert token.log_decay is not None
        memory, momentum = state.chunk(2, -2)
        momentum = token.extras["eta"][..., None, None] * momentum + outer(token.k, token.v)
        memory = token.log_decay.exp()[..., None] * memory + momentum
        return torch.cat((memory, momentum), -2), read(token.q, memory)


@dataclass(frozen=True)
class Fading(UpdateRule):
    """S = a S + k v^T, declared and right. What follows are its broken relatives."""

    form = Recurrence(decay=Decay.SCALAR)

    def projections(self) -> dict[str, Projection]:
        return super().projections() | {"decay": Projection(self.dims.num_value_heads)}

    def gates(self, raw: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"log_decay": F.logsigmoid(upcast(raw["decay"]))}

    @staticmethod
    def step(state: Tensor, token: Tokens) -> tuple[Tensor, Tensor]:
        assert token.log_decay is not None
        state = token.log_decay.exp()[..., None] * state + outer(token.k, token.v)
        return state, read(token.q, state)


class DecayAfterWrite(Fading):
    """What is written fades at once."""

    @staticmethod
    def step(state: Tensor, token: Tokens) -> tuple[Tensor, Tensor]:
        assert token.log_decay is not None
        state = token.log_decay.exp()[..., None] * (state + outer(token.k, token.v))
        return state, read(token.q, state)


class FormLies(Fading):
    """It erases, and declares that it does not."""

    @staticmethod
    def step(state: Tensor, token: Tokens) -> tuple[Tensor, Tensor]:
        assert token.log_decay is not None
        state = token.log_decay.exp()[..., None] * state
        state = state + outer(token.k, token.v - read(token.k, state))
        return state, read(token.q, state)


class FormWithoutItsGate(Fading):
    """It declares a decay that its tokens lack."""

    def gates(self, raw: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {}


class Growing(Fading):
    """The sign of the decay is wrong."""

    def gates(self, raw: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"log_decay": F.softplus(upcast(raw["decay"]))}


class Underflowing(Fading):
    """log(sigmoid(x)) is the logarithm of 0 for an x that is only large."""

    def gates(self, raw: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"log_decay": torch.sigmoid(upcast(raw["decay"])).log()}


class NarrowGates(Fading):
    """Gates in the dtype of the projections."""

    def gates(self, raw: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"log_decay": F.logsigmoid(raw["decay"])}


class LooksAhead(Fading):
    """Queries of the next token."""

    def qk_transform(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat((q[:, 1:], q[:, :1]), 1), k


class LooksBack(Fading):
    """Keys mixed with the row before, whosever it is."""

    def qk_transform(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return q, k + torch.cat((torch.zeros_like(k[:, :1]), k[:, :-1]), 1)


class InPlace(Fading):
    """It writes into the state it was given."""

    @staticmethod
    def step(state: Tensor, token: Tokens) -> tuple[Tensor, Tensor]:
        assert token.log_decay is not None
        with torch.no_grad():
            state.mul_(token.log_decay.exp()[..., None]).add_(outer(token.k, token.v))
        return state, read(token.q, state)


class Narrow(Fading):
    """Float32 inside, whatever it is given."""

    form = None

    @staticmethod
    def step(state: Tensor, token: Tokens) -> tuple[Tensor, Tensor]:
        assert token.log_decay is not None
        state = (token.log_decay.exp()[..., None] * state + outer(token.k, token.v)).float()
        return state, read(token.q.float(), state)


class Detached(Fading):
    """No gradient reaches the decay."""

    form = None

    @staticmethod
    def step(state: Tensor, token: Tokens) -> tuple[Tensor, Tensor]:
        assert token.log_decay is not None
        state = token.log_decay.detach().exp()[..., None] * state + outer(token.k, token.v)
        return state, read(token.q, state)


class Normalized(Fading):
    """Divides by a norm that is 0 for what was never written, and whose gradient there is NaN."""

    form = None

    @staticmethod
    def step(state: Tensor, token: Tokens) -> tuple[Tensor, Tensor]:
        new, output = Fading.step(state, token)
        return new, output / (token.q - token.q).norm(dim=-1, keepdim=True)


class Random(Fading):
    """Another token each time."""

    def qk_transform(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return q, k + 0.1 * torch.randn_like(k)


class Raises(Fading):
    """It can't take more than two tokens."""

    def qk_transform(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        if q.shape[1] > 2:
            raise RuntimeError("three tokens are too many")
        return q, k
