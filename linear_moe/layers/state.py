"""The carried state of a memory layer: what a sequence is continued from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linear_moe.layers.state_file import read_state_file, write_state_file


@dataclass
class MemoryState:
    """State of B sequences in one layer, the shared memory last.

    A forward without gradients writes into these tensors; one with gradients replaces them, so that a graph that still
    needs the old ones (truncated backpropagation) keeps them.
    """

    memory: Tensor
    """`[B, M + shared, H, K, V]` float32 (float64 in a float64 layer)."""
    conv: Tensor | None
    """`[B, M + shared, W, C]` the last W inputs of each memory's convolution; `[B, 1, W, D]` for the scope "sequence"."""
    tokens_seen: Tensor
    """`[B]` int64: real tokens of each sequence so far."""
    owner: str
    """Which layer it belongs to, for the check that it comes back to the same."""

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        fields = {"memory": self.memory, "conv": self.conv, "tokens_seen": self.tokens_seen}
        return {name: tensor for name, tensor in fields.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def batch_size(self) -> int:
        """B"""
        return self.tokens_seen.shape[0]

    def select(self, indices: Tensor) -> MemoryState:
        """A state whose sequence i is this one's `indices[i]` (beam search reorders and repeats)."""
        return self._map(lambda tensor: tensor.index_select(0, indices.to(tensor.device)))

    def clone(self) -> MemoryState:
        """A copy that shares nothing."""
        return self._map(torch.clone)

    def detach(self) -> MemoryState:
        """The same numbers, cut from the graph that made them."""
        return self._map(torch.detach)

    def update(self, memory: Tensor, conv: Tensor | None, lengths: Tensor) -> None:
        """Take the tensors after `lengths` `[B]` more tokens."""
        if torch.is_grad_enabled():
            self.memory = memory
            self.conv = conv if self.conv is not None else None
            self.tokens_seen = self.tokens_seen + lengths
            return
        self.memory.copy_(memory)
        if self.conv is not None and conv is not None:
            self.conv.copy_(conv)
        self.tokens_seen.add_(lengths)

    def save(self, path: str | Path) -> None:
        """Write to a file, aside first and then renamed: what stands at `path` is always whole."""
        write_state_file(path, {"owner": self.owner, "tensors": self.tensors()})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str | None = None) -> MemoryState:
        """Read what `save` wrote.

        Raises:
            ValueError: if the file holds no memory state of this format.
        """
        content = read_state_file(path, "memory", "tensors", device)
        tensors = content["tensors"]
        if "memory" not in tensors:
            raise ValueError(f"{path} holds no memory state")
        return cls(tensors["memory"], tensors.get("conv"), tensors["tokens_seen"], content["owner"])

    def _map(self, change: Any) -> MemoryState:
        conv = None if self.conv is None else change(self.conv)
        return MemoryState(change(self.memory), conv, change(self.tokens_seen), self.owner)
