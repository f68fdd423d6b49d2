"""What the kernels of a rule's form are tuned at."""

from __future__ import annotations

import torch

from linear_moe.forms import Recurrence
from linear_moe.kernels import decode_projections
from linear_moe.tuning.decode_works import DecodeWork, ProjectionWork
from linear_moe.tuning.scan_work import ScanWork
from linear_moe.tuning.search import Work

SLOTS = 192
"""Of a decoded token: 64 sequences with 3 memories each."""


def works_of(
    form: Recurrence, key_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device, *, tokens: int, heads: int
) -> list[Work]:
    """All that kernels of a form are tuned at: its scan, and a decoded token.

    Args:
        form: that has kernels.
        key_dim: K, up to 256.
        value_dim: V, up to 256.
        dtype: of q, k and v.
        device: a GPU.
        tokens: of the timed scan.
        heads: H
    """
    sizes = (key_dim, value_dim, dtype, device)
    return [
        ScanWork(form, *sizes, tokens=tokens, heads=heads),
        DecodeWork(form, *sizes, slots=SLOTS, heads=heads),
        *(ProjectionWork(most, *sizes, heads=heads) for most in decode_projections.LAUNCHES),
    ]
