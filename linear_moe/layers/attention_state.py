"""The carried state of softmax attention: the keys and values that later tokens look back at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class AttentionState:
    """Keys and values of B sequences in one layer, in columns: one a token fed, or `window` in a sliding window.

    A column may be empty in one sequence and filled in another (padding): `valid` says which. A forward without
    gradients writes the columns of a sliding window in place; columns that grow are replaced.
    """

    keys: Tensor
    """`[B, L, H_kv, K]`, rotated to their positions."""
    values: Tensor
    """`[B, L, H_kv, K]`"""
    positions: Tensor
    """`[B, L]` int64: the position in the text of each column's token."""
    valid: Tensor
    """`[B, L]` bool: whether the column holds a real token."""
    tokens_seen: Tensor
    """`[B]` int64: real tokens of each sequence so far."""
    owner: str
    """Which layer it belongs to, for the check that it comes back to the same."""

    @property
    def batch_size(self) -> int:
        """B"""
        return self.tokens_seen.shape[0]

    @property
    def num_columns(self) -> int:
        """L"""
        return self.keys.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def bytes_per_column(self) -> int:
        """Bytes that one token of one sequence takes."""
        columns = (self.keys, self.values, self.positions, self.valid)
        return sum(tensor.shape[2:].numel() * tensor.element_size() for tensor in columns)

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        return {
            "keys": self.keys,
            "values": self.values,
            "positions": self.positions,
            "valid": self.valid,
            "tokens_seen": self.tokens_seen,
        }

    def select(self, indices: Tensor) -> AttentionState:
        """A state whose sequence i is this one's `indices[i]` (beam search reorders and repeats)."""
        return self._map(lambda tensor: tensor.index_select(0, indices.to(tensor.device)))

    def clone(self) -> AttentionState:
        """A copy that shares nothing."""
        return self._map(torch.clone)

    def detach(self) -> AttentionState:
        """The same numbers, cut from the graph that made them."""
        return self._map(torch.detach)

    def extended(self, keys: Tensor, values: Tensor, positions: Tensor, valid: Tensor) -> AttentionState:
        """A state with further columns; this one is left as it is."""
        return AttentionState(
            torch.cat((self.keys.to(keys.dtype), keys), 1),
            torch.cat((self.values.to(values.dtype), values), 1),
            torch.cat((self.positions, positions), 1),
            torch.cat((self.valid, valid), 1),
            self.tokens_seen,
            self.owner,
        )

    def last(self, count: int) -> AttentionState:
        """The last `count` filled columns of each sequence, in order, at the end; empty ones before them."""
        # A stable sort of a bit: the empty columns go to the front and the filled keep their order, at static sizes.
        order = torch.sort(self.valid.to(torch.uint8), dim=1, stable=True).indices[:, -count:]
        wide = order[..., None, None].expand(-1, -1, *self.keys.shape[2:])
        return AttentionState(
            self.keys.gather(1, wide),
            self.values.gather(1, wide),
            self.positions.gather(1, order),
            self.valid.gather(1, order),
            self.tokens_seen,
            self.owner,
        )

    def update(self, new: AttentionState, lengths: Tensor) -> None:
        """Take the columns of `new` after `lengths` `[B]` more tokens, in this state's dtype."""
        keys, values = new.keys.to(self.keys.dtype), new.values.to(self.values.dtype)
        if torch.is_grad_enabled() or new.num_columns != self.num_columns:
            self.keys, self.values, self.positions, self.valid = keys, values, new.positions, new.valid
            self.tokens_seen = self.tokens_seen + lengths
            return
        self.keys.copy_(keys)
        self.values.copy_(values)
        self.positions.copy_(new.positions)
        self.valid.copy_(new.valid)
        self.tokens_seen.add_(lengths)

    def _map(self, change: Callable[[Tensor], Tensor]) -> AttentionState:
        return AttentionState(owner=self.owner, **{name: change(tensor) for name, tensor in self.tensors().items()})
