"""How weights start that no rule has a word on."""

from __future__ import annotations

from torch import Tensor, nn

INIT_STD = 0.02
"""Of embeddings, head, attention and feed-forwards (GPT-2's, and what the published models keep)."""


def normal_init_(weight: Tensor) -> None:
    """N(0, 0.02)."""
    # A draw on the meta device does nothing, but makes torch import its symbolic shapes, for seconds.
    if not weight.is_meta:
        nn.init.normal_(weight, std=INIT_STD)
