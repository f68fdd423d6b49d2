"""Any rule by its `step`, token by token: the oracle of every other implementation, and the way of a rule without a form."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from linear_moe.rules.base import Tokens
from linear_moe.rules.segments import Segments, pad_segments, unpad_segments

Step = Callable[[Tensor, Tokens], tuple[Tensor, Tensor]]

CHECKPOINT_EVERY = 64
"""Tokens between the states that training keeps; those between are made again in the backward pass."""


def recurrent(step: Step, tokens: Tokens, segments: Segments, initial_state: Tensor) -> tuple[Tensor, Tensor]:
    """Run `step` along every segment at once.

    Args:
        step: the rule's recurrence, `UpdateRule.step`.
        tokens: flattened tokens `[S, H, *]` in the state's dtype, q scaled, key heads repeated to the value heads.
        segments: how the tokens fall into segments.
        initial_state: `[N, H, K, V]`.

    Returns:
        The reads `[S, H, V]` and the final state `[N, H, K, V]`.
    """
    fields = {name: x for name, x in tokens._asdict().items() if isinstance(x, Tensor)} | dict(tokens.extras)
    names = list(fields)
    padded = [pad_segments(x, segments) for x in fields.values()]
    lengths = None if segments.dense else segments.lengths[:, None, None, None]

    def walk(start: int, state: Tensor, *block: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for offset in range(block[0].shape[1]):
            token = _token(dict(zip(names, (x[:, offset] for x in block), strict=True)), tokens)
            new, output = step(state, token)
            state = new if lengths is None else torch.where(start + offset < lengths, new, state)
            outputs.append(output)
        return state, torch.stack(outputs, 1)

    state, blocks = initial_state, []
    for start in range(0, segments.max_length, CHECKPOINT_EVERY):
        block = [x[:, start : start + CHECKPOINT_EVERY] for x in padded]
        if torch.is_grad_enabled() and segments.max_length > CHECKPOINT_EVERY:
            state, output = checkpoint(walk, start, state, *block, use_reentrant=False, preserve_rng_state=False)
        else:
            state, output = walk(start, state, *block)
        blocks.append(output)
    return unpad_segments(torch.cat(blocks, 1), segments), state


def _token(fields: dict[str, Tensor], like: Tokens) -> Tokens:
    extras = {name: fields.pop(name) for name in like.extras}
    return Tokens(**fields, extras=extras)
