"""Forward and backward of a batch as a CUDA graph: what a step of training costs is then the GPU's time alone.

A model of many small kernels is launched more slowly, one by one from Python, than a GPU runs it. A graph is captured once for
each shape of batch, and replayed with other tokens in the same places. Its gradients, too, are in the same places each time:
the optimiser reads them where the graph leaves them.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from linear_moe.models.model import LanguageModel
from linear_moe.training.backward import PlainBackward, Scored, backpropagate

WARM_UP_RUNS = 2
"""Before a capture: kernels are compiled, and libraries set up, by the first calls."""
FEWEST_DOCUMENTS = 8
"""Of a packed batch: it is filled up with empty ones to a power of two, so that few graphs do for all."""
MOST_GRAPHS = 4
"""Shapes of batch that are kept captured, since each holds a gradient of every parameter."""


class CapturedBackward:
    """A `Backward` by captured graphs: the numbers of `PlainBackward`, bit for bit.

    A model that can't be captured, because a part of it waits for the device, runs call by call from then on, with a warning.

    Args:
        model: on a CUDA device, in one piece; its parameters must stay where they are.
        precision: as in `TrainSettings`.
    """

    def __init__(self, model: LanguageModel, precision: str) -> None:
        self.model, self.precision = model, precision
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._device = next(model.parameters()).device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(self._device)
        self._graphs: dict[tuple[object, ...], _Captured] = {}
        self._sums: list[Tensor | None] = []
        self._plain: PlainBackward | None = None

    def __call__(self, scored: Scored, weight: float, auxiliary: float, *, first: bool, last: bool) -> Tensor:
        """See `Backward`; the next step writes over the gradients."""
        graph = None if self._plain else self._captured(scored)
        if graph is None:
            assert self._plain is not None
            return self._plain(scored, weight, auxiliary, first=first, last=last)
        loss = graph.replay(scored, weight, auxiliary)
        # With one batch a step nothing needs adding up.
        gradients = graph.gradients if first and last else self._add_up(graph.gradients, first)
        if last:
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient
        # The next batch may be this graph's, too.
        return loss.clone()

    def _captured(self, scored: Scored) -> _Captured | None:
        """The graph for batches of this shape; None if there can be none."""
        key = (*(x.numel() if isinstance(x, Tensor) else x for x in _filled_up(scored)), scored.tokens.shape)
        if key not in self._graphs:
            # Before the capture, which then has the oldest one's memory.
            while len(self._graphs) >= MOST_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            try:
                self._graphs[key] = self._capture(scored)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                reason = str(error).strip().partition("\n")[0]
                warnings.warn(
                    f"training runs call by call: no CUDA graph can be captured ({reason})",
                    RuntimeWarning,
                    stacklevel=2,
                )
                self._graphs.clear()
                self._plain = PlainBackward(self.model, self.precision)
                _forget_gradients(self.parameters)
                return None
        return self._graphs[key]

    def _capture(self, scored: Scored) -> _Captured:
        current = torch.cuda.current_stream(self._device)
        inputs = _filled_up(scored).map(lambda x: x.to(self._device))
        weights = torch.ones(2, dtype=torch.float32, device=self._device)
        self._stream.wait_stream(current)
        # Gradients are made on the stream of their parameter's first use in a graph: all runs are on one.
        with torch.cuda.device(self._device), _same_buffers(self.model), torch.cuda.stream(self._stream):
            for run in range(WARM_UP_RUNS):
                _forget_gradients(self.parameters)
                # The last refuses to wait. To be refused in the midst of a capture would leave torch's generator in it.
                with _no_waiting() if run == WARM_UP_RUNS - 1 else contextlib.nullcontext():
                    backpropagate(self.model, inputs, self.precision, *weights)
            _forget_gradients(self.parameters)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                loss = backpropagate(self.model, inputs, self.precision, *weights)
        current.wait_stream(self._stream)
        gradients = [parameter.grad for parameter in self.parameters]
        _forget_gradients(self.parameters)
        return _Captured(graph, inputs, weights, loss, gradients, _looked_at(self.model))

    def _add_up(self, gradients: Sequence[Tensor | None], first: bool) -> list[Tensor | None]:
        if not self._sums:
            self._sums = [None if gradient is None else torch.empty_like(gradient) for gradient in gradients]
        pairs = [
            (old, new) for old, new in zip(self._sums, gradients, strict=True) if old is not None and new is not None
        ]
        add = torch._foreach_copy_ if first else torch._foreach_add_
        add([old for old, _ in pairs], [new for _, new in pairs])
        return self._sums


class _Captured:
    """A graph and the tensors that it reads and leaves."""

    def __init__(
        self,
        graph: torch.cuda.CUDAGraph,
        inputs: Scored,
        weights: Tensor,
        loss: Tensor,
        gradients: list[Tensor | None],
        looked_at: list[tuple[nn.Module, Any]],
    ) -> None:
        self.graph, self.inputs, self.weights = graph, inputs, weights
        self.loss, self.gradients, self.looked_at = loss, gradients, looked_at
        self._set = (1.0, 1.0)

    def replay(self, scored: Scored, weight: float, auxiliary: float) -> Tensor:
        """Run it on another batch of its shape."""
        for place, new in zip(self.inputs, _filled_up(scored), strict=True):
            if isinstance(place, Tensor) and isinstance(new, Tensor):
                # Pinned, so that the copy does not make the host wait for all that stands before it.
                place.copy_(new.pin_memory(), non_blocking=True)
        if self._set != (weight, auxiliary):
            for place, number in zip(self.weights, (weight, auxiliary), strict=True):
                place.fill_(number)
            self._set = weight, auxiliary
        self.graph.replay()
        for module, routing in self.looked_at:
            module.routing = routing
        return self.loss


def _filled_up(scored: Scored) -> Scored:
    """The same with documents of no tokens behind the last, up to a power of two."""
    borders = scored.cu_seqlens
    if borders is None:
        return scored
    documents = borders.numel() - 1
    wanted = max(FEWEST_DOCUMENTS, 1 << (documents - 1).bit_length())
    return scored._replace(cu_seqlens=torch.cat((borders, borders[-1:].expand(wanted - documents))))


def _looked_at(model: nn.Module) -> list[tuple[nn.Module, Any]]:
    """What the last forward left to be looked at: a replay fills the same tensors, but another graph has others."""
    return [(module, module.routing) for module in model.modules() if hasattr(module, "routing")]


def _forget_gradients(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


@contextlib.contextmanager
def _no_waiting() -> Iterator[None]:
    """What waits for the device is a RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        # Torch says that it may miss some.
        warnings.filterwarnings("ignore", "Synchronization debug mode", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextlib.contextmanager
def _same_buffers(model: nn.Module) -> Iterator[None]:
    """Buffers are as before afterwards: the runs before a capture count for nothing."""
    buffers = list(model.buffers())
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, old in zip(buffers, before, strict=True):
            buffer.copy_(old)
