"""The training loss: cross-entropy of the next token, and the auxiliary losses in the same proportion."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.rules.base import upcast

IGNORED = -100
"""A label that is not counted."""


def next_token_loss(
    logits: Tensor,
    labels: Tensor,
    auxiliary: Tensor,
    *,
    padding_mask: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Mean cross-entropy of each label given the tokens before it, plus the auxiliary losses.

    Args:
        logits: `[B, T, vocab_size]`.
        labels: `[B, T]`, not shifted: the tokens themselves, -100 where one is not counted.
        auxiliary: scalar, the weighted auxiliary losses of this forward pass.
        padding_mask: `[B, T]` bool, true on real tokens; a label at a pad, or right after one, is not counted.
        num_items_in_batch: labels counted in all the micro-batches of an optimiser step. The sum is divided by it instead of
            by this micro-batch's own count, and the auxiliary losses get this micro-batch's share of it, so that the
            losses of the micro-batches add up to that of one large batch.

    Returns:
        A scalar, float32 (float64 for float64 logits). NaN if nothing is counted, as in torch.
    """
    targets = labels[:, 1:].to(logits.device)
    if padding_mask is not None:
        real = padding_mask.to(logits.device)
        targets = torch.where(real[:, 1:] & real[:, :-1], targets, IGNORED)
    total = F.cross_entropy(
        upcast(logits[:, :-1]).flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    counted = (targets != IGNORED).sum()
    auxiliary = auxiliary.to(total)
    if num_items_in_batch is None:
        return total / counted + auxiliary
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return (total + counted * auxiliary) / num_items_in_batch
