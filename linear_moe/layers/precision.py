"""Tensors that stay float32 when their module is cast to a 16-bit dtype."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

HALF_DTYPES = (torch.float16, torch.bfloat16)


class KeepsFloat32(nn.Module):
    """A module whose own parameters and buffers are moved by `.bfloat16()` and `.half()`, but not narrowed.

    A decay of 0.999, a bias that moves by a thousandth, a loss scale: none of them has a bfloat16.
    """

    def _stays_wide(self, name: str) -> bool:
        """Whether the parameter or buffer of this name stays float32; all do unless a subclass says otherwise."""
        return True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeepsFloat32:
        own = {**self._parameters, **self._buffers}
        kept = {id(tensor) for name, tensor in own.items() if tensor is not None and self._stays_wide(name)}
        kept |= {
            id(p.grad) for p in self._parameters.values() if p is not None and p.grad is not None and id(p) in kept
        }

        def apply(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            narrowed = result.dtype in HALF_DTYPES and tensor.dtype not in HALF_DTYPES
            return tensor.to(result.device) if narrowed and id(tensor) in kept else result

        super()._apply(apply, recurse)
        return self
