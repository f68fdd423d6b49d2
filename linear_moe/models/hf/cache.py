"""The cache that `generate` carries: a model's state, whatever its layers keep."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from linear_moe.models.hf.offload import weights_in_place
from linear_moe.models.model import LanguageModel
from linear_moe.models.state import ModelState


class LinearMoECache(Cache):  # type: ignore[misc]
    """The `ModelState` of B sequences: memories, convolution inputs, and the keys and values of attention layers.

    It is filled by the first forward pass that is given it, and updated in place by each further one. Unlike a cache of
    keys and values it can't be cropped: a memory does not give back what it was before a token.

    Args:
        state: to go on from, such as `ModelState.load(path)`; none for the beginning of a text.
        num_columns: columns of `input_ids` that the state has seen, pads included; by default the real tokens of its longest
            sequence.

    Attributes:
        state: the `ModelState`, None before the first token.
    """

    def __init__(self, state: ModelState | None = None, num_columns: int | None = None) -> None:
        super().__init__(layers=[])
        self.state = state
        seen = 0 if state is None else int(state.tokens_seen.max())
        self.num_columns = seen if num_columns is None else num_columns

    def state_for(self, model: LanguageModel, batch_size: int) -> ModelState:
        """The state to run `batch_size` sequences of `model` on, made now if there is none."""
        if self.state is None:
            self.state = new_state(model, batch_size)
        return self.state

    def advance(self, num_columns: int) -> None:
        """Count columns that the state has been run on."""
        self.num_columns += num_columns

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen, pads included, whatever the layer."""
        return self.num_columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: no limit."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Columns that the next `query_length` tokens look at, and where they begin."""
        return self.num_columns + query_length, 0

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.num_columns = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes what `beam_idx[i]` was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Sequence i becomes what `indices[i]` was; there may be fewer or more of them."""
        if self.state is not None:
            self.state = self.state.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times, its copies side by side."""
        if self.state is not None:
            rows = torch.arange(self.state.batch_size).repeat_interleave(repeats)
            self.state = self.state.select(rows)

    def crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError unless nothing is to be removed."""
        if tokens_to_remove:
            raise ValueError(
                f"tokens_to_remove must be 0, got {tokens_to_remove}: a memory does not give back what it was before a "
                "token. Keep a copy (copy.deepcopy) of the cache from before it instead"
            )

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether any token has been seen."""
        return self.state is not None

    @property
    def batch_size(self) -> int:
        """B, -1 before the first token."""
        return -1 if self.state is None else self.state.batch_size

    @property
    def is_initialized(self) -> bool:
        """Whether there is a state."""
        return self.state is not None

    @property
    def is_compileable(self) -> bool:
        """False: `generate` is not to compile the forward pass by itself."""
        return False

    @property
    def is_croppable(self) -> bool:
        """False."""
        return False

    @property
    def is_linear(self) -> list[bool]:
        """Not "linear" in transformers' sense, where nobody counts the columns: a prompt that begins with them is cut."""
        return [False]

    def __len__(self) -> int:
        return 0 if self.state is None else len(self.state.layers)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(batch_size={self.batch_size}, num_columns={self.num_columns})"


def new_state(model: LanguageModel, batch_size: int) -> ModelState:
    """`model.new_state`, also where adapters stand before its mixers or its weights are kept elsewhere."""
    states = []
    for block in model.blocks:
        mixer = _inner(block.mixer)  # type: ignore[arg-type]
        with weights_in_place(mixer) as device:
            states.append(mixer.new_state(batch_size, device=device))
    return ModelState(states, model.config.fingerprint())


def _inner(module: nn.Module) -> Any:
    """What an adapter of peft wraps, once or several times."""
    while hasattr(module, "base_layer"):
        module = module.base_layer  # type: ignore[assignment]
    return module
