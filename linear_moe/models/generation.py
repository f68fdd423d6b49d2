"""Continuing texts: one reading of the prompts, then one step a token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from linear_moe.models.sampling import Sampling
from linear_moe.models.session import Session

if TYPE_CHECKING:
    from linear_moe.models.model import LanguageModel


@torch.no_grad()
def generate(
    model: LanguageModel,
    tokens: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_token: int | None = None,
    padding_mask: Tensor | None = None,
    capture: bool | None = None,
) -> Tensor:
    """Continue each prompt. `Session` does the same in turns, token by token, and from a saved state.

    Args:
        model: what continues.
        tokens: `[B, T]` prompts, at least one real token each.
        max_new_tokens: tokens to add.
        temperature: logits are divided by it before a draw; 0 takes the likeliest token.
        top_k: draw among this many likeliest tokens only.
        top_p: draw among the fewest likeliest tokens that have this probability together only.
        seed: of the draws; without it they come from torch's global generator.
        stop_token: a sequence that has drawn it is filled up with it; when all have, generation ends.
        padding_mask: `[B, T]` bool, true on real tokens, for prompts of several lengths. Pads may stand anywhere.
        capture: whether steps are captured as a CUDA graph; on a GPU unless given.

    Returns:
        `[B, T + new]`, the prompts as they came and at most `max_new_tokens` more.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    sampling = Sampling(temperature, top_k, top_p)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    if stop_token is not None and not 0 <= stop_token < model.config.vocab_size:
        raise ValueError(f"stop_token must be in [0, vocab_size = {model.config.vocab_size}), got {stop_token}")
    if tokens.dim() != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 1:
        raise ValueError(f"tokens must be [B, T] with at least one prompt of one token, got shape {list(tokens.shape)}")
    generator = None if seed is None else torch.Generator(device=tokens.device).manual_seed(seed)
    session = Session(model, tokens.shape[0], capture=capture)
    session.read(tokens, padding_mask=padding_mask)
    drawn = session.write(max_new_tokens, sampling, generator=generator, stop_token=stop_token)
    return torch.cat((tokens, *(new[:, None].to(tokens.dtype) for new in drawn)), 1)
