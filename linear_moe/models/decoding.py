"""Decoding: one token of every sequence at a time, on a GPU as a captured CUDA graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from linear_moe.layers.attention import SoftmaxAttention
from linear_moe.layers.attention_state import AttentionState
from linear_moe.models.state import ModelState

if TYPE_CHECKING:
    from linear_moe.models.model import LanguageModel

RESERVED_COLUMNS = 512
"""Tokens that full attention makes room for at once: a graph is captured again when they are filled."""
WARM_UP_STEPS = 3
"""Before a capture: kernels are compiled, and libraries set up, by the first calls."""


def grows(model: LanguageModel) -> bool:
    """Whether the model's state grows with the text: whether it has full attention."""
    return bool(_growing(model))


class DecodeStep:
    """One token of each of B sequences, from a state that is updated in place.

    On a GPU the step is captured once and then replayed: its tokens stand in one fixed tensor, its state and logits too, so
    that a step costs the device's time alone and not the host's, kernel by kernel. Full attention writes into reserved
    columns; when they are used up, further ones are made and the step is captured anew. Drawing stays outside.

    Args:
        model: in evaluation mode; its parameters must stay where they are.
        state: what the sequences are continued from. Belongs to the step from now on: `release` gives it back.
        capture: whether to capture a graph; on a GPU unless given.
        reserve: columns that full attention makes room for at once; `RESERVED_COLUMNS` unless given.

    Raises:
        ValueError: if a graph is asked for where there is no GPU, or no column is to be reserved.
    """

    def __init__(
        self, model: LanguageModel, state: ModelState, *, capture: bool | None = None, reserve: int | None = None
    ) -> None:
        if reserve is not None and reserve < 1:
            raise ValueError(f"reserve must be at least 1, got {reserve}")
        self.model = model
        self.state = state
        self.device = state.tokens_seen.device
        self.capture = self.device.type == "cuda" if capture is None else capture
        if self.capture and self.device.type != "cuda":
            raise ValueError(f"a CUDA graph needs a CUDA device, the state is on {self.device}")
        self._growing = _growing(model)
        self._reserved = RESERVED_COLUMNS if reserve is None else reserve
        self._room = 0
        self._tokens = torch.zeros(state.batch_size, 1, dtype=torch.int64, device=self.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Feed the next token of each sequence, `[B]`; returns the logits of the one after it, `[B, vocab]`."""
        if self._growing and not self._room:
            self._reserve()
        self._room -= 1
        self._tokens.copy_(tokens[:, None])
        if not self.capture:
            return self._run(self.state)
        if self._graph is None:
            self._record()
        assert self._graph is not None and self._logits is not None
        self._graph.replay()
        # The next replay writes over its own.
        return self._logits.clone()

    def release(self) -> ModelState:
        """The state, without reserved columns. The step can't be called any more if the model has full attention."""
        if self._growing:
            self._graph = None
        return self.state.compact()

    def _run(self, state: ModelState) -> Tensor:
        return self.model.logits(self.model.hidden(self._tokens, state=state)[:, 0])

    def _reserve(self) -> None:
        # The graph's addresses are those of the columns before. Layer by layer, so that no two copies of all are held.
        self._graph = None
        for index in self._growing:
            layer = self.state.layers[index]
            assert isinstance(layer, AttentionState)
            self.state.layers[index] = layer.reserve(self._reserved)
        self._room = self._reserved

    def _record(self) -> None:
        """Capture a step. Recording runs nothing; the steps before it run on a copy, so that the state is not moved on."""
        with torch.cuda.device(self.device):
            scratch = self.state.clone()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP_STEPS):
                    self._run(scratch)
            torch.cuda.current_stream().wait_stream(side)
            del scratch
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._logits = self._run(self.state)


def _growing(model: LanguageModel) -> list[int]:
    """The layers whose states grow."""
    mixers = [block.mixer for block in model.blocks]
    return [i for i, mixer in enumerate(mixers) if isinstance(mixer, SoftmaxAttention) and mixer.window is None]
