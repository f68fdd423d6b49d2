"""Tensors of sizes alone, kept where they are plain."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from linear_moe import static_tensors
from linear_moe.static_tensors import static

CPU = torch.device("cpu")


@pytest.fixture
def made() -> list[tuple[int, str]]:
    return []


@pytest.fixture
def count(made: list[tuple[int, str]]):
    @static
    def upto(size: int, device: torch.device) -> Tensor:
        made.append((size, device.type))
        return torch.arange(size, device=device)

    return upto


def test_what_is_asked_again_is_not_made_again(count, made: list[tuple[int, str]]) -> None:
    first = count(3, CPU)
    assert first.tolist() == [0, 1, 2]
    assert count(3, CPU) is first
    assert count(4, CPU).tolist() == [0, 1, 2, 3]
    assert made == [(3, "cpu"), (4, "cpu")]


def test_what_inference_mode_made_serves_outside(count) -> None:
    with torch.inference_mode():
        inside = count(3, CPU)
    assert not inside.is_inference()
    assert count(3, CPU) is inside


def test_fake_tensors_are_not_kept(count) -> None:
    with FakeTensorMode():
        count(3, CPU)
    assert type(count(3, CPU)) is Tensor
    assert count(3, CPU).tolist() == [0, 1, 2]


def test_a_trace_makes_its_own(count, made: list[tuple[int, str]]) -> None:
    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(x: Tensor) -> Tensor:
        return x + torch.arange(3, device=x.device) + count(3, x.device)

    assert compiled(torch.zeros(3)).tolist() == [0, 2, 4]
    assert count(3, CPU).tolist() == [0, 1, 2]
    assert type(count(3, CPU)) is Tensor


def test_a_device_of_shapes_alone_keeps_nothing(count, made: list[tuple[int, str]]) -> None:
    assert count(3, torch.device("meta")).is_meta
    assert count(3, torch.device("meta")).shape == (3,)
    assert len(made) == 2


def test_a_captured_graph_takes_what_is_there_and_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    @static
    def upto(size: int, device: torch.device) -> Tensor:
        made.append(size)
        return torch.arange(size)

    stream, capturing = [1], [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(static_tensors, "_stream_of", lambda device: stream[0])
    gpu = torch.device("cuda")
    first = upto(3, gpu)
    # Another stream's is not known to be complete, but in a capture, which waits for all.
    stream[0] = 2
    second = upto(3, gpu)
    assert second is not first
    stream[0], capturing[0] = 3, True
    assert upto(3, gpu) is second
    assert upto(4, gpu) is not upto(4, gpu), "a graph's own belongs to it"
    capturing[0] = False
    for size in range(5, 2 * static_tensors.MOST_KEPT):
        upto(size, gpu)
    assert upto(3, gpu) is not second, "dropped, but by the graph"
    capturing[0] = True
    assert upto(3, gpu) is second, "the first graph needs it still"
    made.clear()
    assert upto(2 * static_tensors.MOST_KEPT - 1, gpu).numel() == 2 * static_tensors.MOST_KEPT - 1
    assert not made
