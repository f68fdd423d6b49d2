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
    gradients writes the columns of a sliding window, and those that `reserve` made, in place; columns that grow are
    replaced.
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
    used: Tensor | None = None
    """`[]` int64: how many columns have been fed, where reserved ones stand after them; None where none are reserved."""

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
        tensors = {
            "keys": self.keys,
            "values": self.values,
            "positions": self.positions,
            "valid": self.valid,
            "tokens_seen": self.tokens_seen,
        }
        return tensors if self.used is None else {**tensors, "used": self.used}

    def select(self, indices: Tensor) -> AttentionState:
        """A state whose sequence i is this one's `indices[i]` (beam search reorders and repeats)."""
        # `used` is of the columns, which all sequences share.
        return self._map(lambda x: x.index_select(0, indices.to(x.device)) if x.dim() else x.clone())

    def clone(self) -> AttentionState:
        """A copy that shares nothing."""
        return self._map(torch.clone)

    def detach(self) -> AttentionState:
        """The same numbers, cut from the graph that made them."""
        return self._map(torch.detach)

    def reserve(self, count: int) -> AttentionState:
        """A state with `count` further empty columns, which calls without gradients fill in place: at fixed addresses
        and sizes, as a captured graph needs it.
        """
        wide = {
            name: torch.cat((tensor, tensor.new_zeros(tensor.shape[0], count, *tensor.shape[2:])), 1)
            for name, tensor in self._columns().items()
        }
        used = torch.tensor(self.num_columns, device=self.keys.device) if self.used is None else self.used
        return AttentionState(**wide, tokens_seen=self.tokens_seen, owner=self.owner, used=used)

    def compact(self) -> AttentionState:
        """A state without its reserved columns. Reads how many were fed: a wait for the device."""
        if self.used is None:
            return self
        used = int(self.used)
        kept = {name: tensor[:, :used].clone() for name, tensor in self._columns().items()}
        return AttentionState(**kept, tokens_seen=self.tokens_seen, owner=self.owner)

    def filled(self, keys: Tensor, values: Tensor, positions: Tensor, valid: Tensor) -> AttentionState:
        """A state whose next reserved columns are these; without gradients they are written into this one's tensors.

        Raises:
            ValueError: on a CPU, if fewer are left. (On a GPU a look would be a wait, and writing past them is an error there.)
        """
        assert self.used is not None
        count = keys.shape[1]
        if self.used.device.type == "cpu" and int(self.used) + count > self.num_columns:
            raise ValueError(
                f"state has {self.num_columns - int(self.used)} reserved columns left, this call has {count} tokens"
            )
        index = self.used + torch.arange(count, device=keys.device)
        write = torch.Tensor.index_copy if torch.is_grad_enabled() else torch.Tensor.index_copy_
        came = {"keys": keys, "values": values, "positions": positions, "valid": valid}
        columns = {name: write(old, 1, index, came[name].to(old.dtype)) for name, old in self._columns().items()}
        return AttentionState(**columns, tokens_seen=self.tokens_seen, owner=self.owner, used=self.used + count)

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
        if self.used is not None and new.used is not None and not torch.is_grad_enabled():
            # `filled` has written the columns.
            self.used.copy_(new.used)
            self.tokens_seen.add_(lengths)
            return
        keys, values = new.keys.to(self.keys.dtype), new.values.to(self.values.dtype)
        if torch.is_grad_enabled() or new.num_columns != self.num_columns:
            self.keys, self.values, self.positions, self.valid = keys, values, new.positions, new.valid
            self.used = new.used
            self.tokens_seen = self.tokens_seen + lengths
            return
        self.keys.copy_(keys)
        self.values.copy_(values)
        self.positions.copy_(new.positions)
        self.valid.copy_(new.valid)
        self.tokens_seen.add_(lengths)

    def _columns(self) -> dict[str, Tensor]:
        return {"keys": self.keys, "values": self.values, "positions": self.positions, "valid": self.valid}

    def _map(self, change: Callable[[Tensor], Tensor]) -> AttentionState:
        return AttentionState(owner=self.owner, **{name: change(tensor) for name, tensor in self.tensors().items()})
