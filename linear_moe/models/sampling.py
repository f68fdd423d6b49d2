"""Choosing the next token from its logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Args:
        temperature: logits are divided by it before a draw; 0 takes the likeliest token.
        top_k: draw among this many likeliest tokens only.
        top_p: draw among the fewest likeliest tokens that have this probability together only (1904.09751), after
            `temperature` and `top_k`.

    Raises:
        ValueError: naming the argument that does not fit, or would be ignored.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        # NaN fails every comparison, so what is allowed is what is asked for.
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, or None for all tokens, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, or None for all tokens, got {self.top_p}")
        for name, value in (("top_k", self.top_k), ("top_p", self.top_p)):
            if value is not None and self.temperature == 0:
                raise ValueError(f"{name} = {value} would be ignored at temperature 0, which takes the likeliest token")

    def draw(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """`[B, vocab]` to `[B]` int64. Nothing waits for the device."""
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits.float() / self.temperature
        if self.top_p is None and (self.top_k is None or self.top_k >= logits.shape[-1]):
            return torch.multinomial(torch.softmax(logits, -1), 1, generator=generator)[:, 0]
        # By rank and not by value, so that ties let no further token in.
        kept, tokens = logits.topk(min(self.top_k or logits.shape[-1], logits.shape[-1]), -1)
        probabilities = torch.softmax(kept, -1)
        if self.top_p is not None:
            # A token stays if those before it do not have top_p yet; before the first there are none.
            before = torch.nn.functional.pad(probabilities.cumsum(-1)[..., :-1], (1, 0))
            probabilities = torch.where(before < self.top_p, probabilities, 0)
        place = torch.multinomial(probabilities, 1, generator=generator)
        return tokens.gather(-1, place)[:, 0]
