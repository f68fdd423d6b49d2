"""Memory that the parts of a run write to in turn."""

from __future__ import annotations

import torch
from torch import Tensor


class Workspace:
    """Tensors by name and shape for `out=`, the same for every part: what the last part wrote is still in the caches.

    A fresh tensor of a megabyte is often given back to the system when it is freed, and paid for again page by page. Where a
    backward pass needs the tensors there is nothing to reuse: every name is None, and `out=None` makes a fresh one.
    """

    def __init__(self, like: Tensor, reused: bool) -> None:
        self.reused = reused
        self._like = like
        self._rooms: dict[tuple[object, ...], Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor | None:
        """An uninitialised tensor of `shape`, whose first dim must not grow from one call to the next."""
        if not self.reused:
            return None
        key = (name, *shape[1:])
        room = self._rooms.get(key)
        if room is None:
            room = self._rooms[key] = torch.empty(shape, dtype=self._like.dtype, device=self._like.device)
        return room if room.shape[0] == shape[0] else room[: shape[0]]
