"""Attention of packed documents on a GPU by PyTorch's flash kernels, which read the borders there."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LARGEST_HEAD = 256
HEAD_MULTIPLE = 8


@functools.cache
def _flash() -> tuple[Callable[..., Any], frozenset[str]] | None:
    """`varlen_attn` and the names of its arguments, which have changed from one torch to the next; None without it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


def flash_takes(q: Tensor, window: int | None) -> bool:
    """Whether `attend_packed` has queries like these `[..., H, K]`, and the window."""
    flash = _flash()
    if flash is None or (window is not None and "window_size" not in flash[1]):
        return False
    head_dim = q.shape[-1]
    fits = head_dim <= LARGEST_HEAD and head_dim % HEAD_MULTIPLE == 0
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and fits


def attend_packed(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_length: int, window: int | None) -> Tensor:
    """Causal attention inside each document.

    Args:
        q: `[S, H, K]` bfloat16 or float16.
        k: `[S, H, K]`.
        v: `[S, H, K]`.
        cu_seqlens: `[N + 1]` the borders, on the device. Tokens past the last are in no document.
        max_length: a bound on the tokens of a document.
        window: tokens that a token sees, itself included; all before it if None.

    Returns:
        `[S, H, K]`, 0 for tokens of no document, whose gradients are 0, too.
    """
    flash = _flash()
    assert flash is not None
    attend, names = flash
    inside = (torch.arange(q.shape[0], device=q.device) < cu_seqlens[-1])[:, None, None]
    # On both sides: what is in no document is written by neither pass.
    q, k, v = (torch.where(inside, x, 0) for x in (q, k, v))
    borders = cu_seqlens.to(device=q.device, dtype=torch.int32)
    if "window_size" in names:
        causal: dict[str, object] = {"window_size": (-1 if window is None else window - 1, 0)}
    else:
        causal = {"is_causal": True}
    return torch.where(inside, attend(q, k, v, borders, borders, max_length, max_length, **causal), 0)
