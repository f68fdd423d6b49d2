"""The carried state of a whole model: what its sequences are continued from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linear_moe.layers.attention_state import AttentionState
from linear_moe.layers.state import MemoryState
from linear_moe.layers.state_file import read_state_file, write_state_file

LayerState = MemoryState | AttentionState


@dataclass
class ModelState:
    """The states of B sequences in every layer of one model."""

    layers: list[LayerState]
    fingerprint: str
    """Of the configuration of the model it belongs to."""

    @property
    def batch_size(self) -> int:
        """B"""
        return self.layers[0].batch_size

    @property
    def tokens_seen(self) -> Tensor:
        """`[B]` int64: real tokens of each sequence so far."""
        return self.layers[0].tokens_seen

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(layer.nbytes for layer in self.layers)

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name, `<layer>.<name>`."""
        return {
            f"{i}.{name}": tensor for i, layer in enumerate(self.layers) for name, tensor in layer.tensors().items()
        }

    def select(self, indices: Tensor) -> ModelState:
        """A state whose sequence i is this one's `indices[i]` (beam search reorders and repeats)."""
        return self._map(lambda layer: layer.select(indices))

    def clone(self) -> ModelState:
        """A copy that shares nothing."""
        return self._map(lambda layer: layer.clone())

    def detach(self) -> ModelState:
        """The same numbers, cut from the graph that made them."""
        return self._map(lambda layer: layer.detach())

    def compact(self) -> ModelState:
        """The same without the columns that attention layers had reserved; this one if there are none."""
        reserved = any(isinstance(layer, AttentionState) and layer.used is not None for layer in self.layers)
        return self._map(lambda x: x.compact() if isinstance(x, AttentionState) else x) if reserved else self

    def save(self, path: str | Path) -> None:
        """Write to a file, aside first and then renamed: what stands at `path` is always whole."""
        write_state_file(path, self.content())

    def content(self) -> dict[str, Any]:
        """What a file of it holds: plain data and tensors."""
        layers = [
            {"kind": type(layer).__name__, "owner": layer.owner, "tensors": layer.detach().tensors()}
            for layer in self.compact().layers
        ]
        return {"fingerprint": self.fingerprint, "layers": layers}

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str | None = None) -> ModelState:
        """Read what `save` wrote. Which model it fits is checked where it is used.

        Raises:
            ValueError: if the file holds no model state of this format.
        """
        return cls.of_content(read_state_file(path, "model", "layers", device), str(path))

    @classmethod
    def of_content(cls, content: dict[str, Any], source: str) -> ModelState:
        """From what `content` gave; `source` is what errors call it."""
        try:
            return cls([_read_layer(layer) for layer in content["layers"]], content["fingerprint"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{source} holds no model state: {type(error).__name__} {error}") from error

    def _map(self, change: Callable[[LayerState], LayerState]) -> ModelState:
        return ModelState([change(layer) for layer in self.layers], self.fingerprint)


def _read_layer(content: dict[str, Any]) -> LayerState:
    tensors = content["tensors"]
    if content["kind"] == AttentionState.__name__:
        return AttentionState(owner=content["owner"], **tensors)
    return MemoryState(owner=content["owner"], **{"conv": None, **tensors})
