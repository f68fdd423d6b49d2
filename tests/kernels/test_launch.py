"""A compiled kernel is launched straight, and through Triton's own launch where a hook is to be told of it; stages give way."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton import knobs
from triton.runtime import _allocation
from triton.runtime.errors import OutOfResources

from linear_moe.kernels import launch


class Kernel:
    """What Triton's compiled kernel offers, noting what it is asked for."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, scratch: int = 0) -> None:
        self.metadata = SimpleNamespace(global_scratch_size=scratch)
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


class Scratched(Kernel):
    """It asks for scratch as Triton's launchers do."""

    params = ()

    def __init__(self) -> None:
        super().__init__(scratch=384)
        self.found: list[Tensor] = []

    def run(self, *arguments: Any) -> None:
        self.found.append(_allocation._allocator.get()(384, 128, None))

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launched(*arguments: Any, **options: Any) -> Kernel:
            self.run()
            return self

        return launched


def test_scratch_is_found_in_every_thread_and_left_to_others_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(launch, "_scratch", lambda size, alignment, stream: torch.empty(size, dtype=torch.int8))
    kernel, before = Scratched(), _allocation._allocator.get()

    def run() -> None:
        # First by Triton's own launch, then straight, then as a hook wants it.
        launch.launch_kernel(kernel, 3, None)
        launch.launch_kernel(kernel, 3, None)
        chain = knobs.runtime.launch_enter_hook
        chain.add(print)
        try:
            launch.launch_kernel(kernel, 3, None)
        finally:
            chain.remove(print)
        launch._compiled.clear()

    run()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert [x.numel() for x in kernel.found] == [384] * 6
    assert _allocation._allocator.get() is before


def test_without_scratch_a_kernel_is_run_by_what_triton_made() -> None:
    kernel = Kernel()
    assert launch._Compiled(kernel, ()).run == kernel.run


class Large:
    """A kernel that takes 50 kB of shared memory a stage, where there are `room` kB; it notes what was launched."""

    params = ()

    def __init__(self, room: int) -> None:
        self.room, self.stages = room, list[int]()

    def __getitem__(self, grid: tuple[int]) -> Any:
        def run(*arguments: Any, enable_fp_fusion: bool, num_stages: int = launch.TRITON_STAGES) -> Kernel:
            assert enable_fp_fusion, "it is asked for, whatever this Triton does by itself"
            if 50 * num_stages > self.room:
                raise OutOfResources(50 * num_stages, self.room, "shared memory")
            self.stages.append(num_stages)
            return Kernel()

        return run


@pytest.mark.parametrize("asked", [{"num_stages": 4}, {}])
def test_stages_give_way_to_what_fits(asked: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launch, "_compiled", {})
    kernel = Large(room=120)
    launch.launch_kernel(kernel, 7, None, **asked)
    launch.launch_kernel(kernel, 7, None, **asked)
    assert kernel.stages == [2], "once found, it is launched straight"


def test_what_does_not_fit_at_all_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(OutOfResources, match="Required: 50, Hardware limit: 40"):
        launch.launch_kernel(Large(room=40), 7, None, num_stages=2)
