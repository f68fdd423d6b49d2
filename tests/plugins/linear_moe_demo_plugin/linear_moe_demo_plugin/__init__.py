"""A rule as another package brings it: found by its entry point, never imported by the user."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from linear_moe import Decay, Recurrence, UpdateRule
from linear_moe.rules import Tokens, option


@dataclass(frozen=True)
class LeakyMemory(UpdateRule):
    """S_t = (1 - leak) S_{t-1} + k_t v_t^T."""

    form = Recurrence(decay=Decay.HEAD)

    leak: float = option(0.1, "what the state loses with each token, in [0, 1)")

    def __post_init__(self) -> None:
        if not 0 <= self.leak < 1:
            raise ValueError(f"leak must be in [0, 1), got {self.leak}")

    def gates(self, raw: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"log_decay": raw["q"].new_full((self.dims.num_value_heads,), math.log1p(-self.leak))}

    def step(self, state: Tensor, token: Tokens) -> tuple[Tensor, Tensor]:
        assert token.log_decay is not None
        state = token.log_decay.exp()[..., None] * state + token.k[..., :, None] * token.v[..., None, :]
        return state, (token.q[..., None, :] @ state).squeeze(-2)
