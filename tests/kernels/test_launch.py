"""A compiled kernel is launched straight, and through Triton's own launch where a hook is to be told of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton import knobs

from linear_moe.kernels import launch


class Kernel:
    """What Triton's compiled kernel offers, noting what it is asked for."""

    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.ran: list[tuple[Any, ...]] = []
        self.launched: list[tuple[Any, ...]] = []

    def run(self, *arguments: Any) -> None:
        self.ran.append(arguments)

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *arguments: self.launched.append((grid, *arguments))


@pytest.fixture(autouse=True)
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    # A torch without CUDA has none.
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: f"stream of {device}", raising=False)


def test_arguments_and_constants_go_to_the_current_stream_of_the_device() -> None:
    kernel = Kernel()
    launch._Compiled(kernel, (5, True)).launch(3, 1, (None, 2))
    assert kernel.ran == [(3, 1, 1, "stream of 1", "function", "metadata", None, None, None, None, 2, 5, True)]
    assert not kernel.launched


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_a_hook_is_told(name: str) -> None:
    kernel, hook = Kernel(), lambda metadata: None
    chain = getattr(knobs.runtime, name)
    chain.add(hook)
    try:
        launch._Compiled(kernel, (5,)).launch(3, 0, (2,))
    finally:
        chain.remove(hook)
    assert kernel.launched == [((3, 1, 1), 2, 5)]
    assert not kernel.ran
