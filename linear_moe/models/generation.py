"""Continuing texts: one prefill of the prompts, then one step a token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from linear_moe.rules.validate import check_padding_mask

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
    seed: int | None = None,
    stop_token: int | None = None,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """Continue each prompt.

    Args:
        model: what continues.
        tokens: `[B, T]` prompts, at least one real token each.
        max_new_tokens: tokens to add.
        temperature: logits are divided by it before a draw; 0 takes the likeliest token.
        top_k: draw among this many likeliest tokens only.
        seed: of the draws; without it they come from torch's global generator.
        stop_token: a sequence that has drawn it is filled up with it; when all have, generation ends.
        padding_mask: `[B, T]` bool, true on real tokens, for prompts of several lengths. Pads may stand anywhere.

    Returns:
        `[B, T + new]`, the prompts as they came and at most `max_new_tokens` more.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    _check(model, tokens, max_new_tokens, temperature, top_k, stop_token, padding_mask)
    generator = None
    if seed is not None:
        generator = torch.Generator(device=tokens.device).manual_seed(seed)
    was_training = model.training
    model.eval()
    try:
        state = model.new_state(tokens.shape[0])
        hidden = model.hidden(tokens, padding_mask=padding_mask, state=state)
        rows = torch.arange(tokens.shape[0], device=tokens.device)
        last = torch.full_like(rows, tokens.shape[1] - 1) if padding_mask is None else _last_real(padding_mask)
        logits = model.logits(hidden[rows, last])
        added: list[Tensor] = []
        stopped = torch.zeros_like(rows, dtype=torch.bool)
        while len(added) < max_new_tokens:
            drawn = _draw(logits, temperature, top_k, generator).to(tokens.dtype)
            if stop_token is not None:
                drawn = torch.where(stopped, stop_token, drawn)
                stopped = stopped | (drawn == stop_token)
            added.append(drawn)
            if len(added) == max_new_tokens or (stop_token is not None and bool(stopped.all())):
                break
            logits = model.logits(model.hidden(drawn[:, None], state=state)[:, 0])
    finally:
        model.train(was_training)
    return torch.cat((tokens, *(drawn[:, None] for drawn in added)), 1)


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """`[B, vocab]` to `[B]`."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        # By rank and not by value, so that ties let no further token in.
        kept, tokens = logits.topk(top_k, -1)
        place = torch.multinomial(torch.softmax(kept, -1), 1, generator=generator)
        return tokens.gather(-1, place)[:, 0]
    return torch.multinomial(torch.softmax(logits, -1), 1, generator=generator)[:, 0]


def _last_real(padding_mask: Tensor) -> Tensor:
    """`[B]` the column of each row's last real token."""
    columns = torch.arange(padding_mask.shape[1], device=padding_mask.device)
    return torch.where(padding_mask, columns, 0).amax(1)


def _check(
    model: LanguageModel,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    stop_token: int | None,
    padding_mask: Tensor | None,
) -> None:
    if tokens.dim() != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 1:
        raise ValueError(f"tokens must be [B, T] with at least one prompt of one token, got shape {list(tokens.shape)}")
    if padding_mask is not None:
        check_padding_mask(padding_mask, tokens.shape[0], tokens.shape[1])
        if not bool(padding_mask.any(1).all()):
            raise ValueError("padding_mask must leave every prompt at least one real token, got a row without any")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, or None for all tokens, got {top_k}")
    if top_k is not None and temperature == 0:
        raise ValueError(f"top_k = {top_k} would be ignored at temperature 0, which takes the likeliest token")
    if stop_token is not None and not 0 <= stop_token < model.config.vocab_size:
        raise ValueError(f"stop_token must be in [0, vocab_size = {model.config.vocab_size}), got {stop_token}")
