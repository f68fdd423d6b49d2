"""Memory that the parts of a run write to in turn."""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNED_NUMBERS = 16
"""Every tensor starts at a multiple of this many numbers: a cache line of float32."""


class Workspace:
    """Tensors by name and shape for `out=`, the same for every part: what the last part wrote is still in the caches.

    They lie in one block. An allocator that gives large blocks back when they are freed, to be paid for again page by page, as
    glibc's does, keeps those that are smaller than the largest it has seen freed: one block of all teaches it to keep all,
    where tensors of their own cost one or two milliseconds a call in page faults, or nothing, by luck.

    Where a backward pass needs the tensors there is nothing to reuse: every name is None, and `out=None` makes a fresh one.
    """

    def __init__(self, like: Tensor, numbers: int | None) -> None:
        """Room for `numbers` numbers in the dtype and on the device of `like`, more if need be; None reuses nothing."""
        self.reused = numbers is not None
        self._block = like.new_empty(numbers or 0)
        self._used = 0
        self._rooms: dict[tuple[object, ...], Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor | None:
        """An uninitialised tensor of `shape`, whose first dim must not grow from one call to the next."""
        if not self.reused:
            return None
        key = (name, *shape[1:])
        room = self._rooms.get(key)
        if room is None:
            room = self._rooms[key] = self._take(torch.Size(shape))
        return room if room.shape[0] == shape[0] else room[: shape[0]]

    def over(self, x: Tensor) -> Tensor | None:
        """`x`, to be written over by what is made of it; None where a backward pass may need it."""
        return x if self.reused else None

    def _take(self, shape: torch.Size) -> Tensor:
        start, stop = self._used, self._used + shape.numel()
        if stop > self._block.numel():
            return self._block.new_empty(shape)
        self._used = -(-stop // ALIGNED_NUMBERS) * ALIGNED_NUMBERS
        return self._block[start:stop].view(shape)
