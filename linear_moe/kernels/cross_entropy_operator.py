"""`linear_moe::cross_entropy_`: the kernel of `linear_moe.kernels.cross_entropy` as a torch library operator."""

from __future__ import annotations

import torch
from torch import Tensor

from linear_moe.kernels import cross_entropy
from linear_moe.kernels.operator import operator


@operator("cross_entropy_", mutates=("logits",))
def cross_entropy_(logits: Tensor, labels: Tensor, want_gradient: bool) -> Tensor:
    """The cross entropies of rows of logits `[L, V]` with labels `[L]` int64: `[L]` float32, in nats.

    With `want_gradient` each row of `logits` is replaced by its loss's gradient: the softmax, less 1 at the label. Nothing
    waits for the device, so the labels are not looked at: they must lie in [0, V). Rows may lie apart, their logits not.
    """
    with torch.cuda.device_of(logits):
        return cross_entropy.cross_entropy_(logits, labels, want_gradient)


@torch.library.register_fake("linear_moe::cross_entropy_")
def _(logits, labels, want_gradient):
    return logits.new_empty(logits.shape[0], dtype=torch.float32)
